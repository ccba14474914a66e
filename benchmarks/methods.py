"""Every family of methods learns two real tasks: what it trains, how well it does, how long and in how much memory.

    python benchmarks/methods.py [--table 1|2] [--only NAME ...] [--steps N]

1. SmolLM2-135M-Instruct writes the JSON records of the demo: `lora_ft.train` with the demo preset.
2. all-MiniLM-L6-v2 with a new classification head names the intent of the same messages: a plain PyTorch loop.

A method runs in a process of its own, so that its peak memory is its own: that of the whole process, libraries and
model included. All methods of a table take the same rows in the same order for the same number of steps, seed 0; the
learning rate goes by kind of method, from the tables below. A method that fails is a row that says why.

Rows go to results/methods.json, where rows of other methods stay: the benchmark can be run in parts. With another
number of steps they are only printed.
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lora_ft
from benchmarks._side_by_side import RESULTS, facts, write
from lora_ft.data.read import read_rows
from lora_ft.models.load import Base, load_processor, load_with_new_head
from lora_ft.models.resolve import resolve
from lora_ft.training.batching import step_samples
from lora_ft.training.memory import peak_memory_bytes
from lora_ft_adapters import add_adapter, build_config, count_parameters, trainable

ROOT = Path(__file__).resolve().parents[1]
STEPS = {1: 16, 2: 40}
BATCH = {1: 8, 2: 24}
JUDGED = {1: 40, 2: 120}  # held-out rows; a run of the first judges them three times
LIMIT_S = 900  # for one method
HEAD_RATE = 5e-2  # of the new classification head, whatever the method: it starts at random

# Peak rates for AdamW. Matrices take about ten times what full fine-tuning takes, scales and biases ten times that,
# inputs more still: they are few and far from the loss.
RATES: dict[int, dict[str, float]] = {
    1: {
        "lora": 1e-3, "rslora": 1e-3, "dora": 1e-3, "pissa": 5e-4, "eva": 1e-3, "loraplus": 5e-4, "lorafa": 2e-3,
        "adalora": 2e-3, "lokr": 3e-3, "oft": 1e-3, "road": 5e-3, "vera": 1e-2, "fourierft": 1e-2, "ia3": 1e-2,
        "ln_tuning": 5e-3, "bitfit": 5e-3, "houlsby": 2e-3, "pfeiffer": 2e-3, "parallel": 2e-3, "compacter": 3e-3,
        "loreft": 2e-3, "noreft": 2e-3, "direft": 2e-3, "prefix_tuning": 1e-2, "prompt_tuning": 3e-2, "head": 1e-4,
        "layers": 1e-4,
    },
    2: {
        "head": HEAD_RATE, "lora": 1e-3, "dora": 1e-3, "ia3": 1e-2, "houlsby": 2e-3, "pfeiffer": 2e-3,
        "compacter": 3e-3, "loreft": 2e-3, "direft": 2e-3, "bitfit": 5e-3, "ln_tuning": 5e-3, "prefix_tuning": 3e-2,
        "prompt_tuning": 3e-2, "layers": 1e-4, "full": 1e-4,
    },
}  # fmt: skip
# A Llama has no biases: they are added.
OPTIONS: dict[int, dict[str, dict[str, Any]]] = {1: {"bitfit": {"add_bias": True}}, 2: {}}
TITLES = {
    1: f"SmolLM2-135M-Instruct writes JSON records (the demo): {STEPS[1]} steps of {BATCH[1]} rows",
    2: f"all-MiniLM-L6-v2 names the intent of a message (one of 6): {STEPS[2]} steps of {BATCH[2]} rows",
}
MEASURES = {
    1: ("loss before", "loss after", "token accuracy before", "token accuracy after"),
    2: ("accuracy before", "accuracy after"),
}
ABOUT = (
    "Written by `python benchmarks/methods.py`. Each method trains once, in a process of its own, on the same rows in "
    "the same order for the same number of steps, seed 0; learning rates go by kind of method. Those of the new head "
    "and of prefix tuning, and the number of steps, were set after a look at held-out figures, the others are not "
    "tuned: read the table as what learns at what cost, not as a ranking. Seconds are those of the optimizer steps; "
    "peak memory is of the whole process, libraries and the model included. The first table is `lora_ft.train` "
    "with the demo preset and another method, the base in {dtype}, judged on {judged[1]} held-out rows. In the second "
    "every method also trains a new classification head, at a rate of {head}; the class is the `intent` of the demo's "
    "answers, the base is in float32, judged on {judged[2]} held-out rows. Measured on {device}, {threads} threads, "
    "torch {torch}, transformers {transformers}, peft {peft}."
)
Rows = Sequence[tuple[str, str]]


def demo(name: str, steps: int, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Table 1: one run of the demo with another method; figures by column.

    Args:
        name: of the method.
        steps: optimizer steps.
        recipe: laid over the demo's, for tests.
    """
    ours = {
        "method": {"type": name, **OPTIONS[1].get(name, {})},
        "train": {"steps": steps, "batch_size": BATCH[1], "learning_rate": RATES[1][name]},
        "eval": {"generate": 0},
    }
    rows = read_rows("builtin:support-heldout")
    with tempfile.TemporaryDirectory() as folder:
        judged = Path(folder) / "held-out.jsonl"
        judged.write_text("".join(json.dumps(r.values) + "\n" for r in rows[:: len(rows) // JUDGED[1]]))
        run = lora_ft.train(
            ours, {"data": {"eval": str(judged)}}, recipe or {}, preset="demo", out=Path(folder) / "run"
        )
        found, before, after = run.facts, run.metrics["before"], run.metrics["after"]
    return {
        "trainable parameters": found["trainable_parameters"],
        "loss before": round(before["loss"], 4),
        "loss after": round(after["loss"], 4),
        "token accuracy before": round(before["token_accuracy"], 4),
        "token accuracy after": round(after["token_accuracy"], 4),
        "seconds": round(found["train_s"], 1),
        "peak memory (MiB)": found["peak_memory_bytes"] >> 20,
        "dtype": found["dtype"],
    }


def messages(source: str) -> list[tuple[str, str]]:
    """(message, intent) of each row of a demo data set."""
    return [
        (str(r["prompt"]), str(json.loads(r["completion"])["intent"])) for r in (x.values for x in read_rows(source))
    ]


def classify(name: str, steps: int, source: str, train: Rows, held_out: Rows) -> dict[str, Any]:
    """Table 2: an encoder with a new head learns to name the class of a text; figures by column.

    Args:
        name: of the method.
        steps: optimizer steps.
        source: folder of an encoder with its tokenizer.
        train, held_out: (text, class) pairs.
    """
    classes = sorted({label for _, label in train})
    tokenizer = load_processor(source)
    torch.manual_seed(0)  # the new head starts at random
    base = load_with_new_head(
        source, "AutoModelForSequenceClassification", dtype=torch.float32, device=torch.device("cpu"),
        model_arguments={"num_labels": len(classes), "pad_token_id": tokenizer.pad_token_id},
    )  # fmt: skip

    def batch(rows: Rows) -> dict[str, torch.Tensor]:
        texts = tokenizer([t for t, _ in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([classes.index(c) for _, c in rows])
        return {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"], "labels": labels}

    def accuracy(model: Any) -> float:
        model.eval()
        groups = [batch(held_out[i : i + BATCH[2]]) for i in range(0, len(held_out), BATCH[2])]
        with torch.no_grad():
            right = sum(int((model(**g).logits.argmax(-1) == g["labels"]).sum()) for g in groups)
        return right / len(held_out)

    before = accuracy(base.model)
    options = {**OPTIONS[2].get(name, {}), "modules_to_save": list(base.fresh)}
    model = add_adapter(base.model, build_config(name, options, "SEQ_CLS", base.model))
    model.train()
    optimizer = torch.optim.AdamW(groups_of(model, base, RATES[2][name]), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    for step in range(steps):
        rows = [train[i] for i in step_samples(step, len(train), BATCH[2], seed=0)]
        model(**batch(rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trainable(model)], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {
        "trainable parameters": count_parameters(model)[0],
        "accuracy before": round(before, 4),
        "accuracy after": round(accuracy(model), 4),
        "seconds": round(seconds, 1),
        "peak memory (MiB)": peak_memory_bytes() >> 20,
    }


def groups_of(model: Any, base: Base, rate: float) -> list[dict[str, Any]]:
    """The optimizer's groups: the new head at its own rate, the rest at the method's."""
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in trainable(model):
        sides[any(f".{m}." in name for m in base.fresh)].append(parameter)
    return [{"params": p, "lr": HEAD_RATE if new else rate} for new, p in sides.items() if p]


def measure(table: int, name: str, steps: int) -> dict[str, Any]:
    """One method's figures, in this process."""
    if table == 1:
        return demo(name, steps)
    source = resolve("builtin:minilm-l6", lambda said: print(said, file=sys.stderr))
    held_out = messages("builtin:support-heldout")[: JUDGED[2]]
    return classify(name, steps, source, messages("builtin:support-train"), held_out)


def apart(table: int, name: str, steps: int) -> dict[str, Any]:
    """One method's figures from a process of its own, or why there are none under "error"."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.methods",
        "--alone",
        name,
        "--table",
        str(table),
        "--steps",
        str(steps),
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {LIMIT_S} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        killed = done.returncode < 0
        return {"error": f"killed by signal {-done.returncode}" if killed else reason(done.stderr)}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def reason(stderr: str) -> str:
    """The line of a traceback that says what went wrong: the last one that is not indented."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith(" ")]
    return lines[-1][:200].replace("|", "/") if lines else "no message"


def row(table: int, name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table; every row has the same columns."""
    columns = ("trainable parameters", *MEASURES[table], "seconds", "peak memory (MiB)")
    cells = {c: figures.get(c, "-") for c in columns}
    return {"method": name, "learning rate": RATES[table][name], **cells, "error": figures.get("error", "")}


def merged(held: Mapping[str, Any], table: int, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of the result file with these methods' rows new and all others as they were."""
    about = facts()
    dtypes = [f["dtype"] for f in figures.values() if "dtype" in f]
    dtype = dtypes[0] if dtypes else held.get("dtype", "the dtype that the recipe chooses")
    tables = {TITLES[n]: list(held.get("tables", {}).get(TITLES[n], [])) for n in TITLES}
    rows = {r["method"]: r for r in tables[TITLES[table]]} | {n: row(table, n, f) for n, f in figures.items()}
    tables[TITLES[table]] = [rows[n] for n in RATES[table] if n in rows]
    commits = {TITLES[n]: dict(held.get("commits", {}).get(TITLES[n], {})) for n in TITLES}
    commits[TITLES[table]] |= dict.fromkeys(figures, about["commit"])
    versions = {k: about["versions"][k] for k in ("torch", "transformers", "peft")}
    text = ABOUT.format(
        dtype=dtype, head=f"{HEAD_RATE:g}", judged=JUDGED, device=about["device"], threads=about["threads"], **versions
    )
    tables = {title: rows for title, rows in tables.items() if rows}
    return {"about": text, "tables": tables, "commits": commits, "dtype": dtype, **about}


def save(table: int, figures: Mapping[str, Mapping[str, Any]]) -> Path:
    """Put these methods' rows into results/methods.json."""
    path = RESULTS / "methods.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    return write("methods", merged(held, table, figures))


def chosen(args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """(table, method) of all that is to be measured."""
    for table in args.table or sorted(RATES):
        for name in RATES[table]:
            if not args.only or name in args.only:
                yield table, name


def main() -> None:
    """Measure each method, print its row, write it at once so that a run that is cut off loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted({n for rates in RATES.values() for n in rates})
    parser.add_argument("--table", type=int, action="append", choices=sorted(RATES), help="only this one")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help="only these methods")
    parser.add_argument("--steps", type=int, help="optimizer steps of each method; the results are not written")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.table[0], args.alone, args.steps)))
        return
    for table, name in chosen(args):
        steps = args.steps or STEPS[table]
        started = time.perf_counter()
        figures = apart(table, name, steps)
        wall = time.perf_counter() - started
        print(table, json.dumps(row(table, name, figures)), f"in all {wall:.0f} s", flush=True)
        if steps == STEPS[table]:
            save(table, {name: figures})


if __name__ == "__main__":
    main()
