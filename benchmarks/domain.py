"""An encoder moved to a new domain without labels: does masked language modelling on its text help the task there?

    python benchmarks/domain.py [--shift movies editorials] [--rounds 2]

Stage 1 trains a LoRA on unlabelled text of the new domain (masked language modelling), stage 2 goes on with it on
labelled rows of the old domain. The run trains stage 2 also alone; both are judged on labelled rows of the new domain
that no training saw, as is TF-IDF with a linear model trained on the same labelled rows. The figure is Pearson's
correlation with people's sentiment ratings; the interval is a paired bootstrap over rows. Round n has seed n.
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_ft
from benchmarks import _task_baselines as baselines
from benchmarks._side_by_side import facts, write
from benchmarks._task_data import load_shift
from benchmarks._task_scores import figure, interval, units
from lora_ft.report import make_listener

KIND = "regression"
TEXTS, LABELLED, HELD_OUT = 1500, 1000, 800  # rows
SETTINGS = {
    "model": "builtin:minilm-l6",
    "method": {"type": "lora", "r": 16},
    "train": {"batch_size": 16, "warmup_ratio": 0.03},
}
STAGE_1 = {"epochs": 2, "learning_rate": 5e-4}
STAGE_2 = {"epochs": 2, "learning_rate": 1e-3}
Row = dict[str, Any]


def staged(folder: Path, texts: Sequence[Row], labelled: Sequence[Row], held_out: Sequence[Row], seed: int) -> Path:
    """One staged run with its baseline; its folder."""
    for name, rows in (("texts", texts), ("labelled", labelled), ("held-out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    recipe = {
        **SETTINGS, "seed": seed,
        "stages": [
            {
                "name": "domain", "task": "masked-lm", "train": STAGE_1,
                "data": {"train": str(folder / "texts.jsonl"), "eval": "5%", "max_length": 128},
            },
            {
                "name": "ratings", "task": "regression", "train": STAGE_2,
                "data": {
                    "train": str(folder / "labelled.jsonl"), "eval": str(folder / "held-out.jsonl"), "max_length": 128,
                },
            },
        ],
    }  # fmt: skip
    # The last state of stage 2 counts: the held-out rows are those it is judged on, and may not choose it.
    recipe["stages"][1]["train"] = {**STAGE_2, "eval_every": 10**6}
    lora_ft.train(recipe, out=folder / "run", listener=make_listener())
    return folder / "run"


def predicted(run: Path, folder: Path) -> list[float]:
    """A run's ratings of the held-out rows."""
    out = folder / f"{run.name}-told.jsonl"
    lora_ft.predict(run, str(folder / "held-out.jsonl"), out)
    return [json.loads(line)["value"] for line in out.read_text().splitlines()]


def main() -> None:
    """Train, judge, write results/domain.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shift", nargs=2, default=["movies", "editorials"], metavar=("LABELLED", "NEW"))
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    shift = load_shift(*args.shift)
    texts = [{"text": r["text"]} for r in shift.unlabelled[:TEXTS]]
    labelled, held_out = shift.source.train[:LABELLED], shift.target.held_out[:HELD_OUT]
    sides: dict[str, list[Any]] = {"adapted": [], "alone": []}
    for seed in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run = staged(folder, texts, labelled, held_out, seed)
            for side, place in (("adapted", lora_ft.Run(run).final.path), ("alone", run / "stages" / "baseline")):
                sides[side].append(units(KIND, held_out, predicted(place, folder)))
    sides["TF-IDF"] = [units(KIND, held_out, baselines.regress(labelled, held_out))]
    values = {side: [round(figure(KIND, u), 4) for u in found] for side, found in sides.items()}
    result = {
        "shift": args.shift, "texts": len(texts), "labelled": len(labelled), "held_out": len(held_out),
        "stage 1": STAGE_1, "stage 2": STAGE_2, "pearson": values,
        "mean": {side: round(statistics.mean(v), 4) for side, v in values.items()},
        "adapted against alone": interval(KIND, sides["adapted"], sides["alone"]),
        "adapted against TF-IDF": interval(KIND, sides["adapted"], sides["TF-IDF"]),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    print(f"written to {write('domain', {**result, **facts()})}")


if __name__ == "__main__":
    main()
