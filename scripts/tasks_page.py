"""Write docs/tasks.md: every task with its options from the registry, and what the benchmarks measured.

python -m scripts.tasks_page
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lora_ft.media import ImageAugment, SoundAugment
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
        *_augmentation(),
        *_measured(),
        *_domain(),
        *_digits(),
        *_presets(),
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


def _augmentation() -> list[str]:
    parts = [
        "## Augmentation",
        "`task.augment` of images and sounds. What is drawn hangs on seed, epoch and sample alone: it is the same with "
        "any `data.workers`, and after an interruption. Nothing is on unless it is asked for; judging and "
        "prediction never change their input.",
    ]
    for name, kind in (("images", ImageAugment), ("sounds", SoundAugment)):
        lines = [f"| {name} | default | what it does |", "|---|---|---|"]
        lines += [f"| `{n}` | {_default(f)} | {_cell(f)} |" for n, f in kind.model_fields.items()]
        parts.append("\n".join(lines))
    return parts


def _cell(field: Any) -> str:
    return (field.description or "").replace("|", "\\|")


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
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
    mean, seeds, text = found["mean"], len(found["pearson"]["adapted"]), found["loss of text"]
    return [
        "## A new domain without labels",
        f"{found['model'].removeprefix('builtin:')}, LoRA: first language modelling on {found['texts']} unlabelled "
        f"texts of `{found['shift'][1]}`, then sentiment ratings learnt from {found['labelled']} rows of "
        f"`{found['shift'][0]}` (`stages:`, adapter same). All judged on {found['held_out']} other rows of "
        f"`{found['shift'][1]}`; {seeds} seed{'s'[: seeds > 1]}. `python benchmarks/domain.py`",
        f"Loss of a token of the new domain's text: {text['before']:.3f} before, {text['after']:.3f} after stage 1, "
        f"{_interval(text['after - before'])}. Pearson correlation of the ratings:",
        "| TF-IDF | lora-ft, labelled stage alone | lora-ft, adapted first | adapted - alone | adapted - TF-IDF |\n"
        "|---|---|---|---|---|\n"
        f"| {mean['TF-IDF']:.3f} | {mean['alone']:.3f} | {mean['adapted']:.3f} | "
        f"{_interval(found['adapted against alone'])} | {_interval(found['adapted against TF-IDF'])} |",
    ]


def _digits() -> list[str]:
    path = RESULTS / "digits.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    sets = list(found["rows"])
    heads = [f"{name} ({rows[0]} / {rows[1]})" for name, rows in found["rows"].items()]
    table = ["| model | method | trains | " + " | ".join(heads) + " |", "|---" * (3 + len(sets)) + "|"]
    for model, by_set in found["models"].items():
        for method in found["methods"]:
            rows = [by_set[name][method] for name in sets]
            values = " | ".join(f"{r['accuracy']:.3f} ({r['least']:.3f} - {r['most']:.3f})" for r in rows)
            table.append(f"| {model.removeprefix('tiny-')} | {method} | {_trained(rows)} | {values} |")
    train, epochs = found["train"], " and ".join(map(str, found["pretraining"]["epochs"].values()))
    sizes = " and ".join(f"{n:,}" for n in found["parameters"].values())
    return [
        "## Small image models adapted to other digits",
        f"A ResNet and a ViT ({sizes} parameters without their heads), pretrained in plain PyTorch on the digits 0 to "
        f"4 of scikit-learn ({epochs} epochs), then adapted with `lora_ft.train`, each time with a new head, "
        f"for {train['steps']} steps of {train['batch_size']} images: to the digits 5 to 9, to all ten dark on "
        "light, to all ten lying on their side. Accuracy on images that no training saw (rows are training / test): "
        f"mean (least - most) of {found['rounds']} seeds, the last state of each run; trains: parameters, the new head "
        "of 5 or 10 classes among them. "
        f"{found['device']}, {found['threads']} threads. `python benchmarks/digits.py`",
        "\n".join(table),
    ]


def _trained(rows: list[dict[str, Any]]) -> str:
    """How many parameters, from the smallest head to the largest."""
    numbers = sorted({row["trainable"] for row in rows})
    return " - ".join(f"{n:,}" for n in dict.fromkeys((numbers[0], numbers[-1])))


def _presets() -> list[str]:
    path = RESULTS / "presets.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    table = [
        "| preset | base | metric | before | after | trains | of | seconds | waits for data | peak MiB |",
        "|" + "---|" * 10,
        *(
            f"| {name} | {row['base'].removeprefix('builtin:')} | {row['metric']} | {row['before']:.3f} | "
            f"{row['after']:.3f} | {row['trainable']:,} | {row['total']:,} | {row['seconds']:.0f} | "
            f"{row['data_wait_share']:.1%} | {row['peak_memory_mib']:,} |"
            for name, row in found["presets"].items()
        ),
    ]
    return [
        "## Presets, to their end",
        "`lora-ft train --preset NAME` on held-out rows of the preset's own data. Bases called tiny-... have random "
        "weights and the data are generated: the figures show that a preset learns, not what a real model reaches. "
        "Seconds are those of a machine that did other work beside it. "
        f"{found['device']}, {found['threads']} threads. `python benchmarks/presets.py`",
        "\n".join(table),
    ]


def _interval(found: dict[str, float]) -> str:
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
