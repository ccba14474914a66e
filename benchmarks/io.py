"""Merge, GGUF export, quantisation and adapter swap against a plain read and write of the same bytes.

    python benchmarks/io.py [--rounds 5] [--models builtin:smollm2-135m-instruct llama-411m]

Arms take turns, each in a process of its own on a LoRA (r=16, all linear layers, random B) of the model, SmolLM2 in
float32 or a Llama of 411M parameters in bfloat16 made here: `plain` reads the base's files and writes as many bytes;
`merge` is ours, tensor by tensor; `peft` loads base and adapter, calls merge_and_unload and save_pretrained; `gguf`
writes the merged model in float16; `nf4` quantises while loading; `swap` puts a saved adapter in the place of one on
the model, the second time; `load` does the same with load_adapter. GB/s count what an arm reads and writes, and the
seconds count all of its set-up but imports.
Peak memory is what a process has at most above what it has once everything is imported; for `merge` it is promised to
be at most two of the largest tensor and 300 MB.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ARMS = ("plain", "merge", "peft", "gguf", "nf4", "swap", "load")
CHUNK = 2**26
MADE = "llama-411m"


def peak() -> int:
    """Largest resident size of this process so far, bytes; the kernel's other count starts with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def size(folder: Path) -> int:
    """Bytes of all weights in a folder."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf"))


def plain(base: Path, adapter: Path, out: Path) -> int:
    """Read and write the same bytes."""
    out.mkdir()
    total = 0
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb", buffering=0) as source, (out / path.name).open("wb", buffering=0) as target:
            while block := source.read(CHUNK):
                target.write(block)
                total += 2 * len(block)
    return total


def merged(base: Path, adapter: Path) -> Any:
    """The merged tensors, made one after the other."""
    from lora_ft.models.opening import BaseSpec
    from lora_ft.models.streaming import SavedWeights, hollow_base
    from lora_ft_adapters import load_adapter
    from lora_ft_adapters.streaming import MergedWeights

    model, weights = hollow_base(BaseSpec(str(base), "AutoModelForCausalLM"))
    return SavedWeights(MergedWeights(load_adapter(model, adapter), weights), weights)


def stored(base: Path) -> Any:
    """The dtype of the base's own files."""
    from lora_ft_adapters.weights import TensorFolder

    tensors = TensorFolder(base)
    return tensors.dtype(next(iter(tensors)))


def merge(base: Path, adapter: Path, out: Path) -> int:
    """Ours."""
    from lora_ft.exports.shards import write_shards

    out.mkdir()
    write_shards(out, merged(base, adapter), stored(base))
    return size(base) + size(out)


def peft(base: Path, adapter: Path, out: Path) -> int:
    """PEFT's own way."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), str(adapter))
    model.merge_and_unload().save_pretrained(out)
    return size(base) + size(out)


def gguf(base: Path, adapter: Path, out: Path) -> int:
    """The merged model as GGUF in float16, without reading it back."""
    from transformers import AutoTokenizer

    from lora_ft.artifact import Artifact, Subject
    from lora_ft.exports._gguf.write import write_gguf
    from lora_ft.models.opening import BaseSpec

    model = BaseSpec(str(base), "AutoModelForCausalLM").skeleton()
    made: Any = lambda: merged(base, adapter)  # noqa: E731
    out.mkdir()
    artifact = Artifact(
        Subject("causal-lm", "AutoModelForCausalLM", "lora", None, model), adapter, AutoTokenizer.from_pretrained(base),
        "base", made, "float16", {}, made, made, made, made, {}, made,
    )  # fmt: skip
    write_gguf(artifact, out / "model.gguf")
    return size(base) + size(out)


def nf4(base: Path, adapter: Path, out: Path) -> int:
    """Read and quantise, as a first start does."""
    import torch

    from benchmarks.qlora import weight_bytes
    from lora_ft.models.opening import BaseSpec
    from lora_ft.registry import QUANTIZERS

    arguments = QUANTIZERS.get("nf4").load_arguments(torch.bfloat16)
    spec = BaseSpec(str(base), "AutoModelForCausalLM")
    model = spec.open(dtype=torch.bfloat16, device=torch.device("cpu"), arguments=arguments).model
    return size(base) + weight_bytes(model)


def swap(base: Path, adapter: Path, out: Path) -> int:
    """The adapter's numbers again in their place; the first time, which imports what is needed, is not timed."""
    from transformers import AutoModelForCausalLM

    from lora_ft_adapters import AdapterSlot, load_adapter

    slot = AdapterSlot(load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter))
    slot.put(adapter)
    global started
    started = time.perf_counter()
    slot.put(adapter)
    return size(adapter)


def load(base: Path, adapter: Path, out: Path) -> int:
    """A further adapter built, loaded and made active."""
    from transformers import AutoModelForCausalLM

    from lora_ft_adapters import load_adapter

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    global started
    started = time.perf_counter()
    load_adapter(model, adapter, "second")
    return size(adapter)


started = 0.0


def run_one(arm: str, base: Path, adapter: Path, out: Path) -> None:
    """One arm in this process; prints its figures."""
    global started
    import transformers  # noqa: F401

    import lora_ft.pipeline.artifacts  # noqa: F401

    idle = peak()
    work: Callable[[Path, Path, Path], int] = globals()[arm]
    started = time.perf_counter()
    moved = work(base, adapter, out)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "bytes": moved, "peak": peak() - idle}))


def prepare(model: str, folder: Path) -> tuple[Path, Path]:
    """The base's folder and a random adapter for it."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks._made import make_llama
    from lora_ft.models.resolve import resolve
    from lora_ft_adapters import add_adapter, build_config, save_adapter

    smollm = Path(resolve("builtin:smollm2-135m-instruct", print))
    base = folder / "base" if model == MADE else Path(resolve(model, print))
    if model == MADE:
        make_llama(base)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(smollm / name, base)
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = add_adapter(loaded, build_config("lora", {"r": 16, "init_lora_weights": False}, "CAUSAL_LM", loaded))
    save_adapter(adapted, folder / "adapter", base=model)
    return base, folder / "adapter"


def side_by_side(model: str, rounds: int) -> dict[str, Any]:
    """All arms in turn, `rounds` times."""
    from lora_ft_adapters.weights import TensorFolder

    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as held:
        base, adapter = prepare(model, Path(held))
        tensors = TensorFolder(base)
        largest = max(tensors.numbers(n) * 4 for n in tensors)
        for number in range(rounds):
            for arm in ARMS:
                out = Path(held) / f"{arm}-{number}"
                command = [sys.executable, __file__, "--measure", arm, str(base), str(adapter), str(out)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
                subprocess.run(["rm", "-rf", str(out)], check=True)
        figures: dict[str, Any] = {"bytes of the base": size(base), "largest tensor in float32": largest}
    for arm, each in found.items():
        rate = [r["bytes"] / r["seconds"] / 1e9 for r in each]
        share = [r / (p["bytes"] / p["seconds"] / 1e9) for r, p in zip(rate, found["plain"], strict=True)]
        figures[arm] = {
            "GB/s": statistics.median(rate),
            "of plain": {"median": statistics.median(share), "min": min(share), "max": max(share)},
            "seconds": statistics.median(r["seconds"] for r in each),
            "peak MB": max(r["peak"] for r in each) / 1e6,
        }
        print(model, arm, figures[arm], flush=True)
    figures["limit of merge's peak, MB"] = (2 * largest + 300e6) / 1e6
    return figures


def main() -> None:
    """Run all arms in turn and write benchmarks/results/io.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["builtin:smollm2-135m-instruct", MADE])
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        arm, *paths = arguments.measure
        run_one(arm, *map(Path, paths))
        return
    from benchmarks._side_by_side import RESULTS, facts, write

    path = RESULTS / "io.json"
    before = json.loads(path.read_text()).get("models", {}) if path.exists() else {}
    results: dict[str, Any] = {**facts(), "rounds": arguments.rounds}
    results["models"] = before | {model: side_by_side(model, arguments.rounds) for model in arguments.models}
    print("written to", write("io", results))


if __name__ == "__main__":
    main()
