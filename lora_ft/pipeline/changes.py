"""What a resumed run does otherwise than when it was started."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_ft.recipe.yaml import parse_yaml
from lora_ft.runs import Run

RECIPE = "recipe.resolved.yaml"
OUT = "out"


def changes(run: Run, recipe_text: str, versions: Mapping[str, str]) -> list[str]:
    """A table of the settings and package versions that differ, one line each; empty where none does.

    Args:
        run: as it was left.
        recipe_text: the resolved recipe that it goes on with.
        versions: of the packages now.
    """
    old, _ = parse_yaml((run.path / RECIPE).read_text(encoding="utf-8"), RECIPE)
    new, _ = parse_yaml(recipe_text, RECIPE)
    was = {**dict(_leaves(old)), **{f"version of {k}": v for k, v in run.facts.get("versions", {}).items()}}
    now = {**dict(_leaves(new)), **{f"version of {k}": v for k, v in versions.items()}}
    other = [k for k in {**was, **now} if was.get(k) != now.get(k) and k != OUT]
    width = max(map(len, other), default=0)
    return [f"{k:{width}}  {_shown(was, k)} -> {_shown(now, k)}" for k in other]


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if values.get(key) is not None else "none"
