"""What each export gives back: the artifact's answers against those of the adapter on its base.

    python benchmarks/artifacts.py [--methods lora dora ...] [--bases float32 bfloat16 nf4] [--run NAME=RUN ...]

For each method and each form of the base, `lora_ft.train` adapts a small Llama (4 blocks, 128 wide, made here from a
seed) to 48 rows, and every export format that takes the adapter writes it. The logits of what was read back by the
format's independent reader are compared with those of the adapter on its base in float32 (for formats that are the
adapter alone: on the base as it was trained). Greedy: of 4 prompts, 64 tokens each, how many are the same before the
first difference. `--run` measures a finished run instead, such as that of the demo: greedy there is the answers to 12
held-out questions, up to their ends.
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import lora_ft
from benchmarks._side_by_side import facts, write
from lora_ft.errors import LoraFtError
from lora_ft.exports import read_probes
from lora_ft.models.resolve import resolve
from lora_ft.pipeline.loading import load, plain_base
from lora_ft.pipeline.rows import held_out_rows
from lora_ft.records import Silent
from lora_ft_adapters import load_adapter

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8}, "rslora": {"r": 8}, "dora": {"r": 8}, "pissa": {"r": 8}, "loftq": {"r": 8}, "adalora": {},
    "loha": {"r": 8}, "oft": {}, "vera": {}, "ia3": {}, "layers": {"last": 1}, "head": {}, "houlsby": {"r": 8},
    "prefix_tuning": {},
}  # fmt: skip
RATES = {"vera": 3e-2, "ia3": 3e-2, "prefix_tuning": 3e-2}
BASES = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "nf4": ("float32", "nf4")}
EXPORTED = (
    ("peft", None), ("merged", "float32"), ("merged", "bfloat16"), ("gguf", "float32"), ("gguf", "float16"),
    ("gguf", "q8_0"), ("gguf-adapter", None), ("ollama", "float16"), ("ollama-adapter", "float32"),
    ("onnx", None), ("vllm", None), ("mlx", None),
    ("quantised", None),
)  # fmt: skip
NEW_TOKENS, PROMPTS, QUESTIONS = 64, 4, 12


def small_base(folder: Path) -> Path:
    """A Llama with random weights, with SmolLM2's tokenizer."""
    source = resolve("builtin:smollm2-135m-instruct", lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(base: Path, method: str, form: str, folder: Path) -> lora_ft.Run:
    """A run of 40 steps on rows with a rule that can be learnt."""
    dtype, quant = BASES[form]
    rows = folder / "rows.jsonl"
    lines = [{"prompt": f"colour {i}?", "completion": ("red", "green", "blue")[i % 3]} for i in range(48)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "model": str(base), "quant": quant, "data": {"train": str(rows), "eval": "25%"},
        "method": {"type": method, **METHODS[method]}, "eval": {"generate": 0},
        "train": {"steps": 40, "batch_size": 8, "learning_rate": RATES.get(method, 5e-3), "dtype": dtype},
    }  # fmt: skip
    return lora_ft.train(recipe, out=folder / "run")


def measure(run: lora_ft.Run, folder: Path, prompts: list[list[int]], stops: bool) -> dict[str, Any]:
    """Figures of each export; the reason where a format does not take the adapter."""
    found: dict[str, Any] = {}
    reference: list[list[int]] | None = None
    for name, dtype in EXPORTED:
        key = f"{name} {dtype}" if dtype else name
        out = folder / key.replace(" ", "-")
        try:
            figures = lora_ft.export(run, out, format_name=name, dtype=dtype)
        except LoraFtError as error:
            found[key] = {"refused": error.what}
            continue
        kept = (
            "max_difference", "relative_difference", "kl", "top1_agreement", "update_kept", "weights_kept",
            "golden_difference", "into",
        )  # fmt: skip
        found[key] = {k: figures[k] for k in kept if k in figures}
        model = reread(run, name, out)
        if model is not None:
            reference = reference or greedy(adapted(run).model, prompts, stops)
            found[key]["greedy"] = agreement(reference, greedy(model, prompts, stops))
        print(f"  {key:<18} {found[key]}", flush=True)
    return found


def adapted(run: lora_ft.Run) -> Any:
    """The adapter on its base, in float32 where the base is not quantised."""
    quantised = run.final.facts["quant"] != "none"
    return load(run, dtype=None if quantised else "float32")


def reread(run: lora_ft.Run, name: str, folder: Path) -> Any:
    """The artifact through a reader that can write text; None where there is none in Python."""
    if name == "merged":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if name in ("gguf", "ollama"):
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    if name == "quantised":
        return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).eval()
    if name in ("peft", "vllm"):
        loaded = adapted(run)
        return load_adapter(plain_base(loaded, Silent(), quantised=True), folder, "read_back")
    return None


def questions(run: lora_ft.Run) -> list[list[int]]:
    """Prompts of the first held-out rows."""
    loaded = adapted(run)
    examples, _, _ = held_out_rows(loaded)
    return [loaded.task.prompt(loaded.processor, e, loaded.encode) for e in examples[:QUESTIONS]]


def starts(run: lora_ft.Run) -> list[list[int]]:
    """The first 16 tokens of each probe input."""
    return [one["input_ids"][0, :16].tolist() for one in read_probes(run.final.adapter)[:PROMPTS]]


@torch.inference_mode()
def greedy(model: Any, prompts: list[list[int]], stops: bool) -> list[list[int]]:
    """64 tokens after each prompt, or those up to the end of the answer."""
    written = []
    for ids in prompts:
        inputs = torch.tensor([ids])
        least = 1 if stops else NEW_TOKENS
        out = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, min_new_tokens=least,
            do_sample=False,
        )  # fmt: skip
        written.append(out[0, len(ids) :].tolist())
    return written


def agreement(wanted: list[list[int]], got: list[list[int]]) -> float:
    """Share of tokens before the first difference; what follows it answers another text."""
    same = 0
    for one, other in zip(wanted, got, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return same / sum(len(w) for w in wanted)


def main() -> None:
    """Measure and write benchmarks/results/artifacts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--bases", nargs="*", default=list(BASES))
    parser.add_argument("--run", nargs="*", default=[], help="NAME=RUN: finished runs, measured beside")
    arguments = parser.parse_args()
    path = Path(__file__).parent / "results" / "artifacts.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results.update(facts())
    cells, runs = results.setdefault("small", {}), results.setdefault("runs", {})
    with tempfile.TemporaryDirectory() as held:
        base = small_base(Path(held) / "base")
        for method in arguments.methods:
            for form in arguments.bases:
                print(f"{method}, {form}", flush=True)
                folder = Path(held) / f"{method}-{form}"
                folder.mkdir()
                try:
                    run = train(base, method, form, folder)
                except LoraFtError as error:
                    cells[f"{method} {form}"] = {"refused": error.what}
                    continue
                cells[f"{method} {form}"] = measure(run, folder, starts(run), stops=False)
                write("artifacts", results)
        for given in arguments.run:
            name, _, where = given.partition("=")
            print(name, flush=True)
            folder = Path(held) / f"run-{len(runs)}"
            folder.mkdir()
            run = lora_ft.Run(Path(where))
            runs[name] = measure(run, folder, questions(run), stops=True)
            write("artifacts", results)


if __name__ == "__main__":
    main()
