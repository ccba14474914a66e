"""lora-ft list and schema."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer


class Axis(StrEnum):
    """What can be listed."""

    methods = "methods"
    tasks = "tasks"
    formats = "formats"
    presets = "presets"
    quantizers = "quantizers"
    exports = "exports"
    models = "models"


def list_axis(
    axis: Annotated[Axis, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of objects with name and description.")] = False,
) -> None:
    """List what there is: methods, tasks, data formats, presets, quantisers, export formats, built-in models."""
    rows = [{"name": n, "description": d} for n, d in _entries(axis).items()]
    if as_json:
        print(json.dumps(rows))
        return
    from lora_ft.report.tables import listing

    listing(rows, sys.stdout)


def _entries(axis: Axis) -> dict[str, str]:
    if axis is Axis.presets:
        from lora_ft.recipe import preset_names

        return preset_names()
    if axis is Axis.models:
        from lora_ft.models.builtin import BUILTINS

        return {f"builtin:{n}": m.description for n, m in BUILTINS.items()}
    if axis is Axis.methods:
        from lora_ft_adapters import list_methods

        return {n: m.description for n, m in list_methods().items()}
    from lora_ft import registry

    axes: dict[Axis, registry.Registry[Any]] = {
        Axis.tasks: registry.TASKS, Axis.formats: registry.FORMATS, Axis.quantizers: registry.QUANTIZERS,
        Axis.exports: registry.EXPORTS,
    }  # fmt: skip
    return {n: e.description for n, e in axes[axis].discover().items()}


def schema() -> None:
    """Print the JSON schema of a recipe, for editors and checks."""
    from lora_ft.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
