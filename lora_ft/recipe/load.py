"""Recipes, presets and `--set` values, merged left to right into one validated recipe with an origin for each value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lora_ft.errors import LoraFtError, Problem, UsageError, did_you_mean

from .sections import Recipe
from .yaml import parse_scalar, parse_yaml, read_yaml, write_yaml

KeyPath = tuple[str, ...]
EXCLUSIVE = ("train", ("epochs", "steps"))  # one of these, whichever came last
PRESETS = files("lora_ft.recipe") / "presets"


@dataclass(frozen=True)
class Resolved:
    """A valid recipe and where each of its values came from."""

    recipe: Recipe
    origins: Mapping[KeyPath, str]
    name: str

    def text(self, facts: Mapping[KeyPath, tuple[Any, str]] | None = None) -> str:
        """The recipe as YAML with an origin beside each value. It is itself a recipe that gives the same run.

        Args:
            facts: values that were decided during the run (device, data), with their origin.
        """
        values = self.recipe.model_dump(mode="json")
        origins = dict(self.origins)
        for path, (value, origin) in (facts or {}).items():
            _assign(values, path, value)
            origins[path] = origin
        comments = {p: origins.get(p, "default") for p in _leaves(values)}
        return write_yaml(values, comments, "Every value of this run and where it came from.")


@dataclass
class _Merge:
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any], origin: Mapping[KeyPath, str], path: KeyPath = ()) -> None:
        """Lay `values` over what is there: mappings merge, everything else replaces."""
        for key, value in values.items():
            at = (*path, key)
            if isinstance(value, Mapping):
                if at == ("method",) and "type" in value and value["type"] != self._at(at).get("type"):
                    self._clear(at)  # another method's options would not fit this one
                if not isinstance(self._at(path).get(key), dict):
                    _assign(self.values, at, {})
                self.add(value, origin, at)
            else:
                _assign(self.values, at, value)
                self.origins[at] = origin.get(at, origin.get(("*",), ""))

    def layer(self, values: Mapping[str, Any], origin: Mapping[KeyPath, str]) -> None:
        """Add one source. Of two settings that exclude each other, that of the later source stays."""
        self.add(values, origin)
        given = [k for k in EXCLUSIVE[1] if k in (values.get(EXCLUSIVE[0]) or {})]
        if len(given) == 1:
            for other in EXCLUSIVE[1]:
                if other != given[0]:
                    self._at((EXCLUSIVE[0],)).pop(other, None)
                    self.origins.pop((EXCLUSIVE[0], other), None)

    def _at(self, path: KeyPath) -> dict[str, Any]:
        node: Any = self.values
        for key in path:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        return node if isinstance(node, dict) else {}

    def _clear(self, path: KeyPath) -> None:
        _assign(self.values, path, {})
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}


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
    merge = _Merge()
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
    return Resolved(_validate(merge), merge.origins, name)


def _validate(merge: _Merge) -> Recipe:
    try:
        return Recipe.model_validate(merge.values)
    except ValidationError as error:
        problems = [_problem(dict(e), merge) for e in error.errors()]
        raise_from: LoraFtError = UsageError.collect(
            problems, title=f"the recipe has {len(problems)} problems", fix="lora-ft schema shows every key"
        )
        raise raise_from from None


def _problem(error: Mapping[str, Any], merge: _Merge) -> Problem:
    path = tuple(str(p) for p in error["loc"] if isinstance(p, str | int))
    known = tuple(p for i, p in enumerate(path) if i == 0 or p in merge._at(path[:i]) or error["type"] == "missing")
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


def _assign(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    node = values
    for key in path[:-1]:
        inner = node.get(key)
        if not isinstance(inner, dict):
            inner = node[key] = {}
        node = inner
    node[path[-1]] = value


def _leaves(values: Mapping[str, Any], path: KeyPath = ()) -> list[KeyPath]:
    out: list[KeyPath] = []
    for key, value in values.items():
        out += _leaves(value, (*path, key)) if isinstance(value, Mapping) and value else [(*path, key)]
    return out
