"""QLoRA on the CPU: what 4 bits cost in loss, and save in memory, while loading and after.

    python benchmarks/qlora.py [--parts memory loading training merge] [--steps 60] [--seeds 0 1 2] [--runs FOLDER]

memory: bytes of SmolLM2's weights in float32 and in NF4 with double quantisation, and the resident memory of a process
that holds them. loading: a Llama of 400M parameters in bfloat16 files, quantised while it is loaded, in a process of
its own: the highest anonymous memory above that before it, beside the quantised model and its largest tensor; and the
seconds of a first and a second start. training: the demo with LoRA on both bases and with LoftQ on the one in NF4, same
seeds and orders, by held-out loss; other lengths and seeds in a second call are kept beside. merge: the QLoRA adapter,
and one trained `merge_aware`, each merged and stored in NF4, by held-out loss.
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import math
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import lora_ft
from benchmarks._made import make_llama
from benchmarks._side_by_side import RESULTS, facts, write
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from lora_ft.pipeline.ready import open_base
from lora_ft.pipeline.rows import held_out_rows
from lora_ft.recipe import Recipe
from lora_ft.report import make_listener
from lora_ft.runs import STATUS_DONE
from lora_ft_adapters.fast.merge_aware import MergeAware

MODEL = "builtin:smollm2-135m-instruct"
QUANT = {"type": "nf4", "bnb_4bit_use_double_quant": True}
ARMS = {"float32": ({"type": "none"}, "lora"), "nf4": (QUANT, "lora"), "nf4, loftq": (QUANT, "loftq")}
MB = 2**20
Facts = dict[str, Any]


def _anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def _peak() -> Iterator[Facts]:
    """The highest anonymous memory in the block, sampled every 2 ms, above that before it."""
    found: Facts = {}
    start = highest = _anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found |= {"peak": max(highest, _anonymous()) - start, "kept": _anonymous() - start}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights and of their scales; shared ones once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


def measure(source: str, quant: Facts, dtype: str) -> Facts:
    """Load a base in this process and look at its memory."""
    import bitsandbytes  # noqa: F401 - its import is not part of what is measured
    from transformers import LlamaForCausalLM  # noqa: F401 - nor is this

    recipe = Recipe.model_validate({"model": source, "data": {"train": "none.jsonl"}, "quant": quant})
    started = time.perf_counter()
    with _peak() as memory:
        spec = BaseSpec(source, "AutoModelForCausalLM")
        model = open_base(recipe, spec, getattr(torch, dtype), torch.device("cpu")).model
    seconds = time.perf_counter() - started
    largest = max(p.numel() * getattr(torch, dtype).itemsize for p in model.parameters() if p.is_floating_point())
    unpacked = [m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features")]
    largest = max(largest, max(unpacked) * getattr(torch, dtype).itemsize)
    return {
        **memory, "seconds": seconds, "weights": weight_bytes(model), "largest tensor": largest,
        "maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def apart(source: str, quant: Facts, dtype: str, cache: Path) -> Facts:
    """`measure` in a process of its own, with a cache of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.qlora"]
    done = subprocess.run(
        [*command, "--measure", json.dumps([source, quant, dtype])], capture_output=True, text=True, check=False,
        env={**os.environ, "LORA_FT_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(["."])},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Facts = json.loads(done.stdout.splitlines()[-1])
    return found


def memory() -> Facts:
    """SmolLM2 in float32 and in NF4: weights and resident memory."""
    source = resolve(MODEL, print)
    with tempfile.TemporaryDirectory() as name:
        full = apart(source, {"type": "none"}, "float32", Path(name))
        found = {"float32": full}
        for dtype in ("float32", "bfloat16"):
            found[f"nf4, embedding in {dtype}"] = apart(source, QUANT, dtype, Path(name))
    for one in found.values():
        one["share of float32's weights"] = round(one["weights"] / full["weights"], 4)
    return found


def loading() -> Facts:
    """First and second start of a quantised Llama of 400M parameters."""
    with tempfile.TemporaryDirectory() as name:
        source, cache = Path(name) / "llama", Path(name) / "cache"
        model = make_llama(source)
        count, size = model.num_parameters(), weight_bytes(model)
        del model
        first = apart(str(source), QUANT, "bfloat16", cache)
        second = apart(str(source), QUANT, "bfloat16", cache)
    allowed = first["weights"] + first["largest tensor"]
    return {
        "parameters": count, "bytes in files": size, "first start": first, "second start": second,
        "quantised model + largest tensor": allowed,
        "peak of the first start above that, MB": round((first["peak"] - allowed) / MB, 1),
        "second start, times faster": round(first["seconds"] / second["seconds"], 2),
    }  # fmt: skip


def _train(folder: Path, quant: Facts, steps: int, seed: int = 0, method: str = "lora") -> Path:
    if folder.exists() and lora_ft.Run(folder).facts.get("status") == STATUS_DONE:
        return folder
    recipe = {
        "quant": quant, "eval": {"generate": 0}, "train": {"dtype": "float32", "epochs": None, "steps": steps},
        "method": {"type": method, "r": 16}, "seed": seed,
    }  # fmt: skip
    lora_ft.train(recipe, preset="demo", out=folder, listener=make_listener())
    return folder


def held_out_loss(run: Path, *, stored: bool) -> float:
    """Mean loss a token on the held-out rows; `stored`: of adapter and base merged and quantised again."""
    loaded = lora_ft.load(run)
    examples, _, _ = held_out_rows(loaded)
    encode = loaded.task.encoder(loaded.processor, loaded.encode)
    total, count = 0.0, 0
    with torch.inference_mode(), MergeAware(loaded.model) if stored else nullcontext():
        for example in examples:
            batch = loaded.task.collate(encode(example).samples, loaded.processor)
            loss = loaded.task.loss(loaded.model, batch)
            total, count = total + float(loss.total), count + loss.count
    return total / count


def training(folder: Path, lengths: list[int], seeds: list[int]) -> Facts:
    """The demo in each way, for each number of steps; losses after training by seed, and ratios of their means."""
    found: Facts = {}
    for steps in lengths:
        one: Facts = {"seeds": seeds}
        for arm, (quant, method) in ARMS.items():
            runs = [lora_ft.Run(_train(folder / f"{arm}-{steps}-{seed}", quant, steps, seed, method)) for seed in seeds]
            sides = [run.metrics for run in runs]
            one[arm] = {"before": sides[0]["before"]["loss"], "after": [side["after"]["loss"] for side in sides]}
        means = {arm: sum(one[arm]["after"]) / len(seeds) for arm in ARMS}
        for arm in list(ARMS)[1:]:
            one[arm] |= {
                "loss / float32": means[arm] / means["float32"],
                "perplexity / float32": math.exp(means[arm] - means["float32"]),
            }
        found[f"{steps} steps"] = one
    return found


def merging(folder: Path, steps: int) -> Facts:
    """What one NF4 file is worth, by how its adapter was trained."""
    plain = _train(folder / f"nf4-{steps}-0", QUANT, steps)
    aware = _train(folder / f"aware-{steps}-0", {**QUANT, "merge_aware": True}, steps)
    return {
        "steps": steps,
        "qlora, adapter beside its base": held_out_loss(plain, stored=False),
        "qlora, merged and stored in nf4": held_out_loss(plain, stored=True),
        "merge_aware, merged and stored in nf4": held_out_loss(aware, stored=True),
    }


def main() -> None:
    """Measure, write results/qlora.json; parts that were not asked for keep their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["memory", "loading", "training", "merge"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="where runs are kept; those that are finished are not made again")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*json.loads(args.measure))))
        return
    path = RESULTS / "qlora.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = args.runs or Path(name)
        work = {
            "memory": memory, "loading": loading,
            "training": lambda: result.get("training", {}) | training(folder, args.steps, args.seeds),
            "merge": lambda: merging(folder, args.steps[0]),
        }  # fmt: skip
        for part in args.parts:
            result[part] = work[part]()
            print(part, json.dumps(result[part], indent=1))
            write("qlora", {**result, **facts()})


if __name__ == "__main__":
    main()
