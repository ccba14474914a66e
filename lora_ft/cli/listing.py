"""lora-ft list and schema."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

LEGEND = """no-op: a fresh adapter changes nothing. merge: into the base's weights. nf4: on a 4-bit base.
size: parameters that train on SmolLM2-135M by default. Why not, layers, models: docs/methods.md, or --json."""


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
    rows = _methods() if axis is Axis.methods else [{"name": n, "description": d} for n, d in _entries(axis).items()]
    if as_json:
        print(json.dumps(rows))
        return
    from lora_ft.report import tables

    if axis is Axis.methods:
        tables.methods(rows, sys.stdout)
        print(LEGEND)
    else:
        tables.listing(rows, sys.stdout)


def _methods() -> list[dict[str, Any]]:
    """Every method with what scripts/methods_table.py found when it ran it; a plug-in has its description only."""
    from lora_ft.report import known_methods
    from lora_ft_adapters import list_methods

    known = known_methods()
    return [
        {"name": n, "description": m.description, "family": m.family, **known.get(n, {})}
        for n, m in list_methods().items()
    ]


def _entries(axis: Axis) -> dict[str, str]:
    if axis is Axis.presets:
        from lora_ft.recipe import preset_names

        return preset_names()
    if axis is Axis.models:
        from lora_ft.models.builtin import builtins

        return {f"builtin:{n}": m.description for n, m in builtins().items()}
    from lora_ft import registry

    axes: dict[Axis, registry.Registry[Any]] = {
        Axis.tasks: registry.TASKS, Axis.formats: registry.FORMATS, Axis.quantizers: registry.QUANTIZERS,
        Axis.exports: registry.EXPORTS,
    }  # fmt: skip
    return {n: e.description for n, e in axes[axis].discover().items()}


def schema() -> None:
    """Print the JSON schema of a recipe, for editors and checks."""
    from lora_ft.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
