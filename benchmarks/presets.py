"""Every preset as it is, to its end: the metric that it is about before and after, time and memory.

    python benchmarks/presets.py [--only NAME ...]

Each preset has a process of its own. Figures go to results/presets.json; `python -m scripts.tasks_page` writes the
table of docs/tasks.md from it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._side_by_side import RESULTS, facts, write
from lora_ft.recipe import load_recipe, preset_names
from lora_ft.runs import Run

ROOT = Path(__file__).resolve().parents[1]
MAIN = "from lora_ft.cli import main; main()"
ABOUT = (  # of the metrics that a run reports, the first of these is what its task is about
    "map", "mean_iou", "wer", "span_f1", "exact_match", "recall_at_1", "accuracy", "pearson", "token_accuracy", "loss",
)  # fmt: skip


def measured(name: str) -> dict[str, Any]:
    """One preset, trained by the command that a user would type."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-c", MAIN, "train", "--preset", name, "--out", str(out)]
        started = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        run = Run(out).final.facts
    before, after = run["metrics"]["before"], run["metrics"]["after"]
    about = next(m for m in ABOUT if m in after)
    return {
        "task": run["task"], "base": load_recipe([], [name]).recipe.model,
        "metric": about, "before": before[about], "after": after[about],
        "seconds": round(seconds, 1), "steps": run["steps"], "trainable": run["trainable_parameters"],
        "total": run["total_parameters"], "peak_memory_mib": run["peak_memory_bytes"] >> 20,
        "data_wait_share": run["data_wait_share"],
    }  # fmt: skip


def main() -> None:
    """Run what is asked and keep the rows of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(preset_names()), default=sorted(preset_names()))
    args = parser.parse_args()
    known = RESULTS / "presets.json"
    rows = json.loads(known.read_text())["presets"] if known.exists() else {}
    for name in args.only:
        rows[name] = measured(name)
        where = write("presets", {"presets": dict(sorted(rows.items())), **facts()})
        print(name, json.dumps(rows[name]), f"written to {where}", flush=True)


if __name__ == "__main__":
    main()
