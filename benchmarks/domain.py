"""A model moved to a new domain without labels: does language modelling on its text help, and help the task there?

    python benchmarks/domain.py [--shift movies tweets] [--rounds 1]

Stage 1 trains a LoRA on unlabelled text of the new domain (causal language modelling), stage 2 goes on with it on
labelled rows of the old domain. The run trains stage 2 also alone. Two things are judged on rows of the new domain that
no training saw: the loss on their text, of the model before and after stage 1; and Pearson's correlation with people's
sentiment ratings, of stage 2 after stage 1, of stage 2 alone, and of TF-IDF with a linear model trained on the same
labelled rows. Intervals are 95 % of a paired bootstrap over rows. Round n has seed n.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lora_ft
from benchmarks import _task_baselines as baselines
from benchmarks._side_by_side import facts, write
from benchmarks._task_data import load_shift
from benchmarks._task_scores import RESAMPLES, figure, interval, units
from lora_ft.records import Example
from lora_ft.report import make_listener
from lora_ft_adapters import active

KIND = "regression"
TEXTS, LABELLED, HELD_OUT = 2000, 600, 800  # rows
SETTINGS = {
    "model": "builtin:smollm2-135m-instruct",
    "method": {"type": "lora", "r": 16},
    "train": {"batch_size": 16, "warmup_ratio": 0.03},
}
STAGE_1 = {"epochs": 1, "learning_rate": 5e-4}
STAGE_2 = {"epochs": 2, "learning_rate": 5e-4}
Row = dict[str, Any]


def staged(folder: Path, texts: Sequence[Row], labelled: Sequence[Row], held_out: Sequence[Row], seed: int) -> Path:
    """One staged run with its baseline; its folder."""
    for name, rows in (("texts", texts), ("labelled", labelled), ("held-out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    recipe = {
        **SETTINGS, "seed": seed,
        "stages": [
            {
                "name": "domain", "task": "causal-lm", "train": STAGE_1,
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


def losses(run: Path, held_out: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Of each text, the loss sum and its number of tokens: of the model, and of the adapter on it."""
    loaded = lora_ft.load(run, dtype="float32")
    encode = loaded.task.encoder(loaded.processor, loaded.encode)
    found: dict[str, list[tuple[float, float]]] = {"before": [], "after": []}
    with torch.inference_mode():
        for number, row in enumerate(held_out):
            (sample,) = encode(Example({"text": row["text"]}, str(number))).samples
            batch = loaded.task.collate([sample], loaded.processor)
            for side, as_is in (("before", active(loaded.model)), ("after", nullcontext())):
                with as_is:
                    loss = loaded.task.loss(loaded.model, batch)
                found[side].append((float(loss.total), loss.count))
    return found


def text_losses(found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Mean loss a token on both sides, and how much lower it is after, with its interval."""
    sides = {side: np.array(values) for side, values in found.items()}

    def mean(side: str, rows: Any) -> float:
        total, count = sides[side][rows].sum(0)
        return float(total / count)

    number, draw = len(sides["before"]), np.random.default_rng(0)
    drawn = [draw.integers(number, size=number) for _ in range(RESAMPLES)]
    low, high = np.percentile([mean("after", d) - mean("before", d) for d in drawn], [2.5, 97.5])
    everything = slice(None)
    before, after = mean("before", everything), mean("after", everything)
    return {
        "before": before, "after": after,
        "after - before": {"difference": after - before, "low": float(low), "high": float(high)},
    }  # fmt: skip


def main() -> None:
    """Train, judge, write results/domain.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shift", nargs=2, default=["movies", "tweets"], metavar=("LABELLED", "NEW"))
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    shift = load_shift(*args.shift)
    texts = [{"text": r["text"]} for r in shift.unlabelled[:TEXTS]]
    labelled, held_out = shift.source.train[:LABELLED], shift.target.held_out[:HELD_OUT]
    sides: dict[str, list[Any]] = {"adapted": [], "alone": []}
    text: dict[str, Any] = {}
    for seed in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run = staged(folder, texts, labelled, held_out, seed)
            if not seed:
                text = text_losses(losses(run / "stages" / "1-domain", held_out))
            for side, place in (("adapted", lora_ft.Run(run).final.path), ("alone", run / "stages" / "baseline")):
                sides[side].append(units(KIND, held_out, predicted(place, folder)))
    sides["TF-IDF"] = [units(KIND, held_out, baselines.regress(labelled, held_out))]
    values = {side: [round(figure(KIND, u), 4) for u in found] for side, found in sides.items()}
    result = {
        "shift": args.shift, "texts": len(texts), "labelled": len(labelled), "held_out": len(held_out),
        "model": SETTINGS["model"], "stage 1": STAGE_1, "stage 2": STAGE_2, "loss of text": text, "pearson": values,
        "mean": {side: round(statistics.mean(v), 4) for side, v in values.items()},
        "adapted against alone": interval(KIND, sides["adapted"], sides["alone"]),
        "adapted against TF-IDF": interval(KIND, sides["adapted"], sides["TF-IDF"]),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    print(f"written to {write('domain', {**result, **facts()})}")


if __name__ == "__main__":
    main()
