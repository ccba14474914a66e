"""Write docs/tasks.md: every task with its options from the registry, and what the benchmarks measured.

python -m scripts.tasks_page
"""

import json
from pathlib import Path
from typing import Any

from lora_ft.registry import FORMATS, TASKS, Task

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tasks.md"
RESULTS = ROOT / "benchmarks" / "results"
SIDES = ("TF-IDF", "Trainer", "lora-ft")


def page() -> str:
    """The whole page."""
    parts = [
        "# Tasks",
        "Written by `python -m scripts.tasks_page` from the registry and `benchmarks/results/`.",
        *(_task(t) for t in TASKS.discover().values()),
        *_measured(),
        *_domain(),
    ]
    return "\n\n".join(parts) + "\n"


def _task(task: Task) -> str:
    formats = [f"`{n}`" for n, f in FORMATS.discover().items() if f.kind in task.kinds]
    options = type(task.options).model_fields  # type: ignore[attr-defined]
    lines = [f"## {task.name}", "", task.description, "", f"Rows: {', '.join(formats)} (`lora-ft list formats`)."]
    if task.auto_class:
        head = "; modules that its files lack start at random and train with the adapter" if task.new_head else ""
        lines += ["", f"Model: anything that Transformers' `{task.auto_class}` loads{head}."]
    if options:
        lines += ["", "| option | default | what it is |", "|---|---|---|"]
        lines += [f"| `{n}` | {_default(f)} | {_cell(f)} |" for n, f in options.items()]
    return "\n".join(lines)


def _cell(field: Any) -> str:
    return (field.description or "").replace("|", "\\|")


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "needed" if field.is_required() else f"`{json.dumps(value, default=str)}`"


def _measured() -> list[str]:
    path = RESULTS / "tasks.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    table = [
        "| set | rows | figure | " + " | ".join(SIDES) + " | lora-ft - TF-IDF | lora-ft - Trainer |",
        "|---" * 8 + "|",
    ]
    speed = ["| set | lora-ft tokens/s | Trainer tokens/s | faster by (min - max) | peak MiB, both |", "|---" * 5 + "|"]
    for name, row in found["sets"].items():
        values = " | ".join(f"{row['values'][s]:.3f}" for s in SIDES)
        gains = " | ".join(_interval(row[f"against {s}"]) for s in ("TF-IDF", "Trainer"))
        table.append(f"| {name} | {row['rows']} / {row['held_out']} | {row['figure']} | {values} | {gains} |")
        ratio, own, peer = row["faster by"], row["lora-ft"], row["Trainer"]
        speed.append(
            f"| {name} | {own['tokens_per_s']:.0f} | {peer['tokens_per_s']:.0f} | {ratio['median']:.2f} "
            f"({ratio['min']:.2f} - {ratio['max']:.2f}) | {own['peak_memory_mib']}, {peer['peak_memory_mib']} |"
        )
    about = [f"- `{name}`: {row['about']}; {_settings(row)}" for name, row in found["sets"].items()]
    return [
        "## Measured on real data",
        "all-MiniLM-L6-v2 in float32, LoRA r=16 on all linear layers and the new head: `lora_ft.train` against Hugging "
        "Face's `Trainer` with plain PEFT (same rows, epochs, batch size, rate, schedule, truncation), and TF-IDF of "
        "words and letters with a linear model whose strength is cross-validated (for tags: word shapes, neighbours). "
        f"Mean of {found['rounds']} seeds; 95 % intervals by paired bootstrap over held-out rows; rows are training / "
        f"held-out. {found['device']}, {found['threads']} threads, torch {found['versions']['torch']}, transformers "
        f"{found['versions']['transformers']}. `python benchmarks/tasks.py` (pip gets the data).",
        "\n".join(table),
        "\n".join(speed),
        "\n".join(about),
    ]


def _settings(row: dict[str, Any]) -> str:
    return f"{row['epochs']} epochs, batch {row['batch_size']}, rate {row['learning_rate']:g}"


def _domain() -> list[str]:
    path = RESULTS / "domain.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    mean, seeds = found["mean"], len(found["pearson"]["adapted"])
    return [
        "## A new domain without labels",
        f"Sentiment ratings learnt from {found['labelled']} rows of `{found['shift'][0]}`, judged on "
        f"{found['held_out']} rows of `{found['shift'][1]}`, after masked language modelling on {found['texts']} of "
        f"its texts (`stages:`, adapter same) or without. Pearson correlation, mean of {seeds} seeds. "
        "`python benchmarks/domain.py`",
        "| TF-IDF | lora-ft, labelled stage alone | lora-ft, adapted first | adapted - alone | adapted - TF-IDF |\n"
        "|---|---|---|---|---|\n"
        f"| {mean['TF-IDF']:.3f} | {mean['alone']:.3f} | {mean['adapted']:.3f} | "
        f"{_interval(found['adapted against alone'])} | {_interval(found['adapted against TF-IDF'])} |",
    ]


def _interval(found: dict[str, float]) -> str:
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
