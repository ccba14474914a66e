"""Recipes, presets and `--set` values, merged left to right into one validated recipe with an origin for each value."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from lora_ft.errors import Problem, UsageError, did_you_mean

from ._section import Section
from .merge import STAGES, KeyPath, Merge, assign, names_a_type
from .sections import Recipe, StagedKeys, StageKeys
from .yaml import parse_scalar, parse_yaml, read_yaml, write_yaml

BASELINE = "baseline"
HEADING = "Every value of this run and where it came from."
STAGED_HEADING = "What was given, and where it came from; the folder of each stage has every value of it."
T = TypeVar("T", bound=Section)
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

        Of one with stages it holds what was given; the folder of each stage has every value.

        Args:
            facts: values that were decided during the run (device, data), with their origin.
        """
        values = copy.deepcopy(dict(self.values)) if self.stages else self.recipe.model_dump(mode="json")
        origins = dict(self.origins)
        for path, (value, origin) in (facts or {}).items():
            assign(values, path, value)
            origins[path] = origin
        comments = {p: origins.get(p, "default") for p in _leaves(values)}
        return write_yaml(values, comments, STAGED_HEADING if self.stages else HEADING)


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
    for setting in sorted(sets, key=lambda s: not names_a_type(s.partition("=")[0])):
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set takes a.b=value, got {setting!r}", fix="--set train.learning_rate=1e-4")
        _check_stage(merge, key)
        merge.layer(_nested(key.split("."), parse_scalar(text)), {("*",): f"--set {key}"})
    if STAGES in merge.values:
        return _staged(merge, name)
    recipe, problems = _parsed(Recipe, merge)
    return Resolved(_only(recipe, problems), merge.origins, name)


def _check_stage(merge: Merge, key: str) -> None:
    """`--set stages.N` changes a stage that there is; it would be easy to count from 1 and so add one."""
    first, _, rest = key.partition(".")
    there = merge.at((STAGES,))
    if first == STAGES and rest.split(".")[0] not in there:
        named = ", ".join(f"{STAGES}.{n} ({_label(n, s)})" for n, s in there.items())
        raise UsageError(f"--set {key}: there is no such stage", why=f"there are: {named or 'none'}")


def _label(number: str, own: Any) -> str:
    given = own.get("name") if isinstance(own, Mapping) else None
    return str(given or f"stage{int(number) + 1}")


def _staged(merge: Merge, name: str) -> Resolved:
    """A recipe for each stage: the shared keys with the stage's own laid over them."""
    given = merge.values[STAGES]
    if not isinstance(given, Mapping) or len(given) < 2:
        got = f"{len(given)}" if isinstance(given, Mapping) else repr(given)
        raise UsageError(
            f"stages: a list of two or more recipes, got {got}",
            where=merge.origins.get((STAGES,), ""),
            fix="write the keys of a single stage at the top of the recipe",
        )
    values = {**merge.values, STAGES: list(given.values())}
    whole = {n: v for n, v in given.items() if isinstance(v, Mapping)}
    about = {STAGES: list(whole.values()), **{k: v for k, v in values.items() if k == BASELINE}}
    keys, problems = _parsed(StagedKeys, Merge(about, merge.origins))
    for number in (n for n in given if n not in whole):
        what = f"{STAGES}.{number}: a mapping of recipe keys, got {given[number]!r}"
        problems.append(Problem(what, merge.origins.get((STAGES, number), "")))
    stages: list[Stage] = []
    for number, own in whole.items():
        found, wrong = _stage(merge, number, own)
        stages, problems = stages + found, problems + wrong
    names = [s.name for s in stages]
    twice = next((n for n in names if names.count(n) > 1), None)
    problems += [Problem(f"stages: the name {twice!r} is used twice")] if twice else []
    baseline = _only(keys, list(dict.fromkeys(problems))).baseline
    return Resolved(stages[-1].resolved.recipe, merge.origins, name, tuple(stages), baseline, values)


def _stage(merge: Merge, number: str, own: Mapping[str, Any]) -> tuple[list[Stage], list[Problem]]:
    """The stage, if it is valid, and what is wrong with it."""
    at = (STAGES, number)
    shared = {k: v for k, v in merge.values.items() if k not in (STAGES, BASELINE)}
    origins = {p: o for p, o in merge.origins.items() if p[0] != STAGES}
    origins_own = {p[2:]: o for p, o in merge.origins.items() if p[:2] == at and p != at}
    laid = Merge(origins={p: o for p, o in (origins | origins_own).items() if merge.at(p) or merge.at((*at, *p))})
    laid.layer(shared, origins)
    laid.layer({k: v for k, v in own.items() if k not in StageKeys.model_fields}, origins_own)
    recipe, problems = _parsed(Recipe, laid, at, own)
    of_stage = Merge({k: v for k, v in own.items() if k in StageKeys.model_fields}, origins_own)
    keys, wrong = _parsed(StageKeys, of_stage, at, own)
    if recipe is None or keys is None:
        return [], problems + wrong
    label = _label(number, own)
    return [Stage(label, Resolved(recipe, laid.origins, label), keys.adapter)], []


def _only(value: T | None, problems: Sequence[Problem]) -> T:
    """The value, or the error that tells all problems."""
    if value is None or problems:
        raise UsageError.collect(
            problems, title=f"the recipe has {len(problems)} problems", fix="lora-ft schema shows every key"
        )
    return value


def _parsed(
    kind: type[T], merge: Merge, stage: KeyPath = (), own: Mapping[str, Any] | None = None
) -> tuple[T | None, list[Problem]]:
    """The values as `kind`, or what is wrong with them; `stage` is the path of a stage and `own` what it says."""
    try:
        return kind.model_validate(merge.values), []
    except ValidationError as error:
        return None, [_problem(dict(e), merge, stage, own or {}) for e in error.errors()]


def _problem(error: Mapping[str, Any], merge: Merge, stage: KeyPath, own: Mapping[str, Any]) -> Problem:
    path = tuple(str(p) for p in error["loc"] if isinstance(p, str | int))
    known = tuple(p for i, p in enumerate(path) if i == 0 or p in merge.at(path[:i]) or error["type"] == "missing")
    at = next((merge.origins[known[:n]] for n in range(len(known), 0, -1) if known[:n] in merge.origins), "")
    of_stage = error["type"] == "missing" or _has(own, known)
    dotted = ".".join((*(stage if of_stage else ()), *known)) or "recipe"
    if path == (BASELINE,) and not stage and error["type"] == "extra_forbidden":
        return Problem(f"{BASELINE!r} goes with {STAGES!r}, and there are none", at)
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(path[-1], [*_keys(path[:-1]), *_beside(path, of_stage and bool(stage))])
        return Problem(f"unknown key {dotted!r}; {hint}", at)
    if error["type"] == "missing":
        return Problem(f"{dotted!r} is missing", at)
    message = str(error["msg"]).removeprefix("Value error, ")
    return Problem(f"{dotted}: {message[0].lower()}{message[1:]}, got {error.get('input')!r}", at)


def _has(values: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


def _beside(path: KeyPath, of_stage: bool) -> list[str]:
    """Keys at the top of a recipe or of a stage that are none of `Recipe`."""
    return list((StageKeys if of_stage else StagedKeys).model_fields) if len(path) == 1 else []


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


def _leaves(values: Any, path: KeyPath = ()) -> list[KeyPath]:
    """Paths of values that are no mapping; in a list of mappings the number of each is a part."""
    if isinstance(values, list) and values and all(isinstance(v, Mapping) for v in values):
        values = {str(i): v for i, v in enumerate(values)}
    if not isinstance(values, Mapping) or (path and not values):
        return [path]
    return [leaf for key, value in values.items() for leaf in _leaves(value, (*path, key))]
