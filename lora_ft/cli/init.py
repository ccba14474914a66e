"""lora-ft init: a few questions, or flags, and a commented recipe."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_ft.errors import UsageError

DEFAULT_TASK = "causal-lm"
DEFAULT_MODEL = "builtin:smollm2-135m-instruct"
DEFAULT_ENCODER = "builtin:minilm-l6"


def init(  # noqa: PLR0913 - one argument per option
    path: Annotated[Path, typer.Argument(help="Recipe file to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="Base model: hub id, folder, .gguf file or builtin:NAME.")] = None,
    task: Annotated[str, typer.Option(help="What is learnt (`lora-ft list tasks`).")] = DEFAULT_TASK,
    data: Annotated[str | None, typer.Option(help="Training rows.")] = None,
    held_out: Annotated[str | None, typer.Option("--eval", help="Held-out rows, or a share such as 10%.")] = None,
    method: Annotated[str | None, typer.Option(help="Adapter method (`lora-ft list methods`).")] = None,
    full: Annotated[bool, typer.Option("--full", help="Write every key, not only the ones most people set.")] = False,
) -> None:
    """Write a commented recipe. Asks for what no flag gives; without a terminal it takes the defaults."""
    if path.exists():
        raise UsageError("the recipe file exists", where=str(path), fix="lora-ft init ANOTHER.yaml")
    if not path.parent.is_dir():
        raise UsageError("the folder of the recipe does not exist", where=str(path))
    ask = sys.stdin.isatty()
    values: dict[str, Any] = {
        "model": model or _ask("Base model", DEFAULT_MODEL if task == DEFAULT_TASK else DEFAULT_ENCODER, ask),
        "task": {"type": task},
        "data": {
            "train": data or _ask("Training rows (file, folder or hub id)", "data.jsonl", ask),
            "eval": held_out or _ask("Held-out rows (file, or a share)", "10%", ask),
        },
        "method": {"type": method or _ask("Method", "lora", ask)},
    }
    from lora_ft.recipe import Recipe, write_yaml
    from lora_ft.registry import TASKS

    TASKS.get(task)
    recipe = Recipe.model_validate(values).model_dump(mode="json")
    recipe["train"] |= {"epochs": 3} if recipe["train"]["epochs"] is None else {}
    if not full:
        recipe = {
            "model": recipe["model"],
            "task": recipe["task"],
            "data": {k: recipe["data"][k] for k in ("train", "eval", "max_length")},
            "method": {**recipe["method"], **({"r": 16} if recipe["method"]["type"] == "lora" else {})},
            "train": {k: recipe["train"][k] for k in ("epochs", "batch_size", "learning_rate")},
            "seed": recipe["seed"],
        }
    heading = f"Train with: lora-ft train {path}\nEvery key: lora-ft schema, or lora-ft init --full"
    path.write_text(write_yaml(recipe, _comments(Recipe, ()), heading), encoding="utf-8")
    print(f"wrote {path}\nnext: lora-ft train {path} --dry-run")


def _ask(question: str, default: str, ask: bool) -> str:
    return str(typer.prompt(question, default=default, err=True)) if ask else default


def _comments(section: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {("method", "r"): "Rank of the update; alpha is 32 unless lora_alpha says so."}
    for name, field in section.model_fields.items():
        at = (*path, name)
        found[at] = field.description or ""
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            found |= _comments(field.annotation, at)
    return found
