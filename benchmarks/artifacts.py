"""What each export gives back: the artifact's answers against those of the adapter on its base.

    python benchmarks/artifacts.py [--methods lora dora ...] [--bases float32 bfloat16 nf4] [--run NAME=RUN ...]

A small Llama (4 blocks, 128 wide, made here from a seed) is taught to recite days, months and colours. Then for each
method and each form of that base `lora_ft.train` adapts it to recite them backwards, and every export format that takes
the adapter writes it. The logits of what was read back by the format's independent reader are compared with those of
the adapter on its base in float32 (for formats that are the adapter alone: on the base as it was trained). Greedy: of
the answers to 4 held-out questions, at most 64 tokens each, how many are the same before the first difference. `--run`
measures a finished run instead, such as that of the demo, with 12 questions.
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import lora_ft
from benchmarks._side_by_side import facts, write
from lora_ft.errors import LoraFtError
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
RATES = {"vera": 0.1, "ia3": 0.3, "prefix_tuning": 0.1, "loha": 1e-2, "houlsby": 1e-2}
BASES = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "nf4": ("float32", "nf4")}
EXPORTED = (
    ("peft", None), ("merged", "float32"), ("merged", "bfloat16"), ("gguf", "float32"), ("gguf", "float16"),
    ("gguf", "q8_0"), ("gguf-adapter", None), ("ollama", "float16"), ("ollama-adapter", "float32"),
    ("onnx", None), ("vllm", None), ("mlx", None),
    ("quantised", None),
)  # fmt: skip
NEW_TOKENS = 64
CYCLES = {
    "days": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "months": ["January", "February", "March", "April", "May", "June", "July", "August"],
    "colours": ["red", "orange", "yellow", "green", "blue", "purple"],
}  # fmt: skip


def recited(rows: int, seed: int, step: int) -> list[dict[str, str]]:
    """Questions with 20 words of a cycle as the answer; some cycles and some beginnings are asked for more often.

    So that a model that was taught them prefers one continuation clearly at every place, as real ones mostly do.
    """
    rng = random.Random(seed)
    names = list(CYCLES)
    found = []
    for _ in range(rows):
        (name,) = rng.choices(names, [4.0**-i for i in range(len(names))])
        words = CYCLES[name]
        (start,) = rng.choices(range(len(words)), [2.0**-i for i in range(len(words))])
        answer = " ".join(words[(start + step * i) % len(words)] for i in range(20))
        found.append({"prompt": f"{name} from {words[start]}", "completion": answer})
    return found


def taught_base(folder: Path) -> Path:
    """A Llama that recites forwards, with SmolLM2's tokenizer; all of its weights are trained here."""
    source = resolve("builtin:smollm2-135m-instruct", lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}],
            tokenize=False,
        )
        for r in recited(512, seed=0, step=1)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    recipe = {
        "model": str(folder / "random"), "method": "full", "data": {"train": str(folder / "texts.jsonl"), "eval": "5%"},
        "eval": {"generate": 0},
        "train": {"steps": 300, "batch_size": 16, "learning_rate": 2e-3, "dtype": "float32", "eval_every": 300},
    }  # fmt: skip
    run = lora_ft.train(recipe, out=folder / "taught")
    print(f"the base: held-out perplexity {run.metrics['after']['perplexity']:.3f} a token", flush=True)
    lora_ft.merge(run, folder / "base", dtype="float32")
    return folder / "base"


def train(base: Path, method: str, form: str, folder: Path) -> lora_ft.Run:
    """A run of 160 steps that teaches to recite backwards."""
    dtype, quant = BASES[form]
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in recited(96, seed=1, step=-1)))
    recipe = {
        "model": str(base), "quant": quant, "data": {"train": str(rows), "eval": "25%"},
        "method": {"type": method, **METHODS[method]}, "eval": {"generate": 0},
        "train": {"steps": 160, "batch_size": 8, "learning_rate": RATES.get(method, 5e-3), "dtype": dtype},
    }  # fmt: skip
    return lora_ft.train(recipe, out=folder / "run")


def measure(run: lora_ft.Run, folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
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
            reference = reference or greedy(adapted(run).model, prompts)
            found[key]["greedy"] = agreement(reference, greedy(model, prompts))
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


def questions(run: lora_ft.Run, count: int) -> list[list[int]]:
    """Prompts of the first held-out rows."""
    loaded = adapted(run)
    examples, _, _ = held_out_rows(loaded)
    return [loaded.task.prompt(loaded.processor, e, loaded.encode) for e in examples[:count]]


@torch.inference_mode()
def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """At most 64 tokens after each prompt, up to the end of the answer."""
    written = []
    for ids in prompts:
        inputs = torch.tensor([ids])
        out = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False
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
        base = taught_base(Path(held))
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
                cells[f"{method} {form}"] = measure(run, folder, questions(run, 4))
                write("artifacts", results)
        for given in arguments.run:
            name, _, where = given.partition("=")
            print(name, flush=True)
            folder = Path(held) / f"run-{len(runs)}"
            folder.mkdir()
            run = lora_ft.Run(Path(where))
            runs[name] = measure(run, folder, questions(run, 12))
            write("artifacts", results)


if __name__ == "__main__":
    main()
