"""Recipes, presets and `--set` values, merged left to right into one validated recipe with an origin for each value."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lora_ft.errors import LoraFtError, Problem, UsageError, did_you_mean

from .merge import STAGES, KeyPath, Merge, assign
from .sections import Recipe
from .yaml import parse_scalar, parse_yaml, read_yaml, write_yaml

BASELINE = "baseline"
STAGE_KEYS = ("name", "adapter")
PRESETS = files("lora_ft.recipe") / "presets"


@dataclass(frozen=True)
class Stage:
    """One of several trainings in a row.

    Attributes:
        name: of its folder.
        resolved: its recipe: the shared keys with its own laid over them.
        adapter: same: it goes on with the adapter of the stage before; new: that one is merged into the base.
    """

    name: str
    resolved: "Resolved"
    adapter: str


@dataclass(frozen=True)
class Resolved:
    """A valid recipe and where each of its values came from.

    Attributes:
        recipe: the recipe; of one with stages, that of the last stage.
        origins: of each value.
        name: of the file or preset, for the run's folder.
        stages: in order; () for a plain recipe.
        baseline: whether the last stage is also trained without the others, for comparison.
        values: of a recipe with stages, as they were given.
    """

    recipe: Recipe
    origins: Mapping[KeyPath, str]
    name: str
    stages: tuple[Stage, ...] = ()
    baseline: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)

    def text(self, facts: Mapping[KeyPath, tuple[Any, str]] | None = None) -> str:
        """The recipe as YAML with an origin beside each value. It is itself a recipe that gives the same run.

        Args:
            facts: values that were decided during the run (device, data), with their origin.
        """
        values = dict(self.values) if self.stages else self.recipe.model_dump(mode="json")
        origins = dict(self.origins)
        for path, (value, origin) in (facts or {}).items():
            assign(values, path, value)
            origins[path] = origin
        comments = {p: origins.get(p, "default") for p in _leaves(values)}
        return write_yaml(values, comments, "Every value of this run and where it came from.")


def preset_names() -> dict[str, str]:
    """Name and description of each preset."""
    found = {}
    for entry in sorted(PRESETS.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            values, _ = parse_yaml(entry.read_text(encoding="utf-8"), entry.name)
            found[entry.name.removesuffix(".yaml")] = str(values.get("description", ""))
    return found


def load_recipe(
    recipes: Sequence[Path | Mapping[str, Any]] = (), presets: Sequence[str] = (), sets: Sequence[str] = ()
) -> Resolved:
    """Merge presets, then recipes, then `a.b=c` settings, and validate the result.

    Raises:
        UsageError: with every problem found, each at its file and line or its `--set`.
    """
    merge = Merge()
    name = "run"
    for preset in presets:
        known = preset_names()
        if preset not in known:
            raise UsageError(f"unknown preset {preset!r}; {did_you_mean(preset, known)}", fix="lora-ft list presets")
        values, _ = parse_yaml((PRESETS / f"{preset}.yaml").read_text(encoding="utf-8"), preset)
        merge.layer(values, {("*",): f"preset {preset}"})
        name = preset
    for source in recipes:
        if isinstance(source, Mapping):
            merge.layer(source, {("*",): "python"})
            continue
        values, lines = read_yaml(source)
        merge.layer(values, {p: f"{source}:{line}" for p, line in lines.items()})
        merge.origins.update({p: f"{source}:{line}" for p, line in lines.items()})
        name = source.stem
    for setting in sets:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set takes a.b=value, got {setting!r}", fix="--set train.learning_rate=1e-4")
        merge.layer(_nested(key.split("."), parse_scalar(text)), {("*",): f"--set {key}"})
    return _staged(merge, name) if STAGES in merge.values else Resolved(_validate(merge), merge.origins, name)


def _staged(merge: Merge, name: str) -> Resolved:
    """A recipe for each stage: the shared keys with the stage's own laid over them."""
    shared = {k: v for k, v in merge.values.items() if k not in (STAGES, BASELINE)}
    stages: list[Stage] = []
    for number, given in enumerate(merge.values[STAGES].values(), 1):
        own = {k: v for k, v in given.items() if k not in STAGE_KEYS} if isinstance(given, Mapping) else None
        where = merge.origins.get((STAGES, str(number - 1)), "")
        if own is None:
            raise UsageError(f"stage {number} must be a mapping of recipe keys", where=where)
        label, adapter = str(given.get("name", f"stage{number}")), str(given.get("adapter", "same"))
        if adapter not in ("same", "new"):
            raise UsageError(f"stages: adapter {adapter!r} is neither same nor new", where=where)
        if not re.fullmatch(r"[\w-]+", label) or label in [s.name for s in stages]:
            raise UsageError(f"stages: the name {label!r} is used twice or is no word", where=where)
        laid = Merge()
        laid.layer(shared, merge.origins)
        laid.layer(own, {p[2:]: o for p, o in merge.origins.items() if p[:2] == (STAGES, str(number - 1))})
        stages.append(Stage(label, Resolved(_validate(laid), laid.origins, label), adapter))
    if len(stages) < 2:
        raise UsageError("stages: one stage is no stage", fix="write its keys at the top of the recipe")
    values = {**merge.values, STAGES: list(merge.values[STAGES].values())}
    baseline = bool(merge.values.get(BASELINE, True))
    return Resolved(stages[-1].resolved.recipe, merge.origins, name, tuple(stages), baseline, values)


def _validate(merge: Merge) -> Recipe:
    try:
        return Recipe.model_validate(merge.values)
    except ValidationError as error:
        problems = [_problem(dict(e), merge) for e in error.errors()]
        raise_from: LoraFtError = UsageError.collect(
            problems, title=f"the recipe has {len(problems)} problems", fix="lora-ft schema shows every key"
        )
        raise raise_from from None


def _problem(error: Mapping[str, Any], merge: Merge) -> Problem:
    path = tuple(str(p) for p in error["loc"] if isinstance(p, str | int))
    known = tuple(p for i, p in enumerate(path) if i == 0 or p in merge.at(path[:i]) or error["type"] == "missing")
    at = next((merge.origins[known[:n]] for n in range(len(known), 0, -1) if known[:n] in merge.origins), "")
    dotted = ".".join(known) or "recipe"
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(path[-1], _keys(path[:-1]))
        return Problem(f"unknown key {dotted!r}; {hint}", at)
    if error["type"] == "missing":
        return Problem(f"{dotted!r} is missing", at)
    message = str(error["msg"]).removeprefix("Value error, ")
    return Problem(f"{dotted}: {message[0].lower()}{message[1:]}, got {error.get('input')!r}", at)


def _keys(path: KeyPath) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in path:
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        kinds = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not kinds:
            return []
        model = kinds[0]
    return list(model.model_fields)


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def _leaves(values: Mapping[str, Any], path: KeyPath = ()) -> list[KeyPath]:
    out: list[KeyPath] = []
    for key, value in values.items():
        out += _leaves(value, (*path, key)) if isinstance(value, Mapping) and value else [(*path, key)]
    return out
