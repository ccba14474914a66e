"""lora-ft, Hugging Face's Trainer with plain PEFT, and TF-IDF with a linear model, on the same real rows.

    python benchmarks/tasks.py [--only SET ...] [--rounds 2]

The base is all-MiniLM-L6-v2 in float32, the method LoRA r=16 on all linear layers and the new head, the same epochs,
batch size, schedule, clipping and truncation on both sides; settings are in SETS below and are not tuned. Each training
has a process of its own; rounds alternate the sides, round n has seed n. Tokens are those of the rows without padding;
seconds run from the first batch to the end of the last step, without evaluation and without saving. All sides are
judged by the same code (`_task_scores`).

Figures go to results/tasks.json; `python -m scripts.tasks_page` writes docs/tasks.md from it.
"""

import argparse
import json
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lora_ft
from benchmarks import _task_baselines as baselines
from benchmarks._side_by_side import RESULTS, facts, paired, write
from benchmarks._task_data import load
from benchmarks._task_peer import Peer
from benchmarks._task_scores import FIGURES, cosines, figure, interval, ranks, units
from lora_ft.models.resolve import resolve
from lora_ft.records import Silent

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 600  # rows
MODEL = "builtin:minilm-l6"
COMMON = {
    "max_length": 128, "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "modules_to_save": ["classifier"], "warmup_ratio": 0.03,
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "questions": {"rows": 1000, "epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
    "products": {"rows": 800, "epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
    "tweet-entities": {"rows": 1916, "epochs": 6, "batch_size": 8, "learning_rate": 5e-4},
    "headlines": {"rows": 300, "epochs": 2, "batch_size": 16, "learning_rate": 5e-4},
}
TASKS = {"sentence-pairs": "sentence-embedding"}  # kind of set -> task; the others have the task's name
Row = dict[str, Any]


class Clock(Silent):
    """Seconds of training and its tokens, without evaluation."""

    began = ended = tokens = 0.0

    def start(self, plan: Any) -> None:
        """Training begins."""
        self.began = time.perf_counter()

    def step(self, record: Mapping[str, Any]) -> None:
        """A step is done."""
        self.ended, self.tokens = time.perf_counter(), record["tokens"]


def ours(
    kind: str, setting: Mapping[str, Any], train: Sequence[Row], held_out: Sequence[Row], seed: int
) -> dict[str, Any]:
    """One training by `lora_ft.train`, and its answers by `lora_ft.predict`."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "train.jsonl", train)
        recipe = {
            "model": MODEL, "task": TASKS.get(kind, kind), "seed": seed,
            "data": {"train": str(folder / "train.jsonl"), "eval": None, "max_length": setting["max_length"]},
            "method": {"type": "lora", **setting["lora"]},
            "train": {
                **{k: setting[k] for k in ("epochs", "batch_size", "learning_rate", "warmup_ratio")},
                "dtype": "float32", "save_every": 10**6,
            },
        }  # fmt: skip
        run = lora_ft.train(recipe, out=folder / "run", listener=clock)
        sides = ("anchor", "positive") if kind == "sentence-pairs" else ()
        asked = [{"text": row[s]} for s in sides for row in held_out] or [_question(row) for row in held_out]
        _write(folder / "ask.jsonl", asked)
        lora_ft.predict(run, str(folder / "ask.jsonl"), folder / "told.jsonl")
        told = [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]
        found = run.facts
    return {
        "tokens": clock.tokens, "seconds": clock.ended - clock.began, "answers": _answers(kind, told, held_out),
        "steps": found["steps"], "trainable": found["trainable_parameters"], "peak_memory": found["peak_memory_bytes"],
        "fast_path": found["fast_path"],
    }  # fmt: skip


def theirs(
    kind: str, setting: Mapping[str, Any], train: Sequence[Row], held_out: Sequence[Row], seed: int
) -> dict[str, Any]:
    """The same by Trainer and PEFT."""
    peer = Peer(kind, resolve(MODEL, lambda said: print(said, file=sys.stderr)), setting, train)
    with tempfile.TemporaryDirectory() as folder:
        found = peer.train(seed, grouped=False, folder=folder)
    return {**found, "answers": peer.answers(held_out)}


def linear(kind: str, train: Sequence[Row], held_out: Sequence[Row]) -> list[Any]:
    """Answers of the baseline."""
    if kind == "sentence-pairs":
        return ranks(held_out, baselines.similarity(train, held_out))
    method = {"text-classification": baselines.classify, "regression": baselines.regress}.get(kind, baselines.tag)
    return list(method(train, held_out))


def measure(name: str, side: str, seed: int) -> dict[str, Any]:
    """One side of one set, in this process."""
    data, setting = load(name, lambda said: print(said, file=sys.stderr)), {**COMMON, **SETS[name]}
    train, held_out = data.train[: setting["rows"]], data.held_out[:HELD_OUT]
    if side == "linear":
        return {"answers": linear(data.spec.kind, train, held_out)}
    return (ours if side == "lora-ft" else theirs)(data.spec.kind, setting, train, held_out, seed)


def apart(name: str, side: str, seed: int) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--measure", name, side, str(seed), str(path)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}"})
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def compared(name: str, rounds: int) -> dict[str, Any]:
    """A set's row: figures, intervals, speed and memory."""
    data = load(name, print)
    kind, held_out = data.spec.kind, data.held_out[:HELD_OUT]
    runs: dict[str, list[dict[str, Any]]] = {"lora-ft": [], "Trainer": []}
    for seed in range(rounds):
        for side, found in runs.items():
            found.append(apart(name, side, seed))
            print(f"{name}: {side}, seed {seed}: {found[-1]['tokens'] / found[-1]['seconds']:.0f} tokens/s", flush=True)
    scored = {side: [units(kind, held_out, r["answers"]) for r in found] for side, found in runs.items()}
    scored["TF-IDF"] = [units(kind, held_out, apart(name, "linear", 0)["answers"])]
    row: dict[str, Any] = {
        "kind": kind, "about": data.spec.about, "figure": FIGURES[kind], "held_out": len(held_out), **SETS[name],
        "values": {side: statistics.mean(figure(kind, u) for u in found) for side, found in scored.items()},
        "against TF-IDF": interval(kind, scored["lora-ft"], scored["TF-IDF"]),
        "against Trainer": interval(kind, scored["lora-ft"], scored["Trainer"]),
        "faster by": paired(*([r["seconds"] / r["tokens"] for r in runs[s]] for s in ("lora-ft", "Trainer"))),
        "fast_path": runs["lora-ft"][0]["fast_path"],
    }  # fmt: skip
    for side, found in runs.items():
        row[side] = {
            "tokens_per_s": statistics.median(r["tokens"] / r["seconds"] for r in found),
            "peak_memory_mib": max(r["peak_memory"] for r in found) >> 20,
            **{k: found[0][k] for k in ("tokens", "steps", "trainable")},
        }
    return row


def _question(row: Row) -> Row:
    return {k: v for k, v in row.items() if k in ("text", "tokens")}


def _answers(kind: str, told: Sequence[Row], held_out: Sequence[Row]) -> list[Any]:
    if kind == "sentence-pairs":
        vectors = [t["embedding"] for t in told]
        return ranks(held_out, cosines(vectors[: len(held_out)], vectors[len(held_out) :]))
    key = {"token-classification": "tags", "regression": "value"}.get(kind, "output")
    return [t[key] for t in told]


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def main() -> None:
    """Measure what is asked and keep the rows of the other sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--measure", nargs=4, metavar=("SET", "SIDE", "SEED", "FILE"), help="one side, for internal use"
    )
    args = parser.parse_args()
    if args.measure:
        name, side, seed, path = args.measure
        Path(path).write_text(json.dumps(measure(name, side, int(seed))))
        return
    known = RESULTS / "tasks.json"
    rows = json.loads(known.read_text())["sets"] if known.exists() else {}
    for name in args.only:
        rows[name] = compared(name, args.rounds)
        where = write("tasks", {"sets": {n: rows[n] for n in SETS if n in rows}, "rounds": args.rounds, **facts()})
        print(json.dumps(rows[name], indent=1), f"\nwritten to {where}", flush=True)


if __name__ == "__main__":
    main()
