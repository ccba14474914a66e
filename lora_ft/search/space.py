"""What may vary: `key=a,b,c` or `key=low..high` with :log, :int or a number of points."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from lora_ft.errors import UsageError, did_you_mean
from lora_ft.recipe import Resolved, load_recipe
from lora_ft.recipe.yaml import parse_scalar

if TYPE_CHECKING:
    from optuna.trial import Trial

Settings = dict[str, str]  # key -> text, as after --set
EXAMPLE = "--space train.learning_rate=1e-5..1e-3:log, or --space method.r=4,8,16"
FLAGS = ("log", "int")
RANGE = re.compile(r"([^,:\s]+?)\.\.([^,:\s]+)((?::[\w.+-]+)*)")
BETWEEN = 0.382  # a place in a range where the value is no whole number by accident
POINT_DIGITS = 6  # of the points of low..high:N, so that 1e-5..1e-3:log:3 has 0.0001 in it


@dataclass(frozen=True)
class Choices:
    """One of some values, each as its text."""

    key: str
    texts: tuple[str, ...]

    def suggest(self, trial: "Trial") -> str:
        """The value of this trial."""
        return str(trial.suggest_categorical(self.key, self.texts))

    def samples(self) -> tuple[str, ...]:
        """Values that must fit the recipe."""
        return self.texts


@dataclass(frozen=True)
class Range:
    """A number between two others, both included."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: "Trial") -> str:
        """The value of this trial."""
        if self.whole:
            return repr(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def samples(self) -> tuple[str, ...]:
        """Values that must fit the recipe; for any number also one that is not whole."""
        inner = () if self.whole else (self.low + BETWEEN * (self.high - self.low),)
        return tuple(repr(v) for v in (self.low, *inner, self.high))


Axis = Choices | Range


def parse_space(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Axes in the order in which their values are set: a whole section before its keys, and of these its type first.

    Raises:
        UsageError: not `key=values`, an empty list, a range that runs backwards, a key or a value twice.
    """
    axes = [_axis(text) for text in texts]
    keys = [a.key for a in axes]
    twice = next((k for k in keys if keys.count(k) > 1), None)
    if twice:
        raise UsageError(f"--space has {twice!r} twice", fix=f"give one --space {twice}=... with all its values")
    return tuple(sorted(axes, key=lambda a: (a.key.count("."), not a.key.endswith(".type"))))


def combinations(axes: Sequence[Axis]) -> list[Settings] | None:
    """Every combination once, the last axis running fastest; None when an axis is a range."""
    lists = [a.texts for a in axes if isinstance(a, Choices)]
    if len(lists) < len(axes):
        return None
    return [dict(zip([a.key for a in axes], values, strict=True)) for values in product(*lists)]


def with_settings(base: Resolved, settings: Mapping[str, str]) -> Resolved:
    """The recipe with `a.b` -> value laid over it, as `--set` would."""
    new = load_recipe([plain_values(base)], sets=[f"{k}={v}" for k, v in settings.items()])
    origins = {**base.origins, **{tuple(k.split(".")): "sweep" for k in settings}}
    return replace(new, origins=origins, name=base.name)


def plain_values(resolved: Resolved) -> dict[str, Any]:
    """The recipe as a mapping that `load_recipe` takes, without `out`."""
    values = dict(resolved.values) if resolved.stages else resolved.recipe.model_dump(mode="json")
    values.pop("out", None)
    return values


def check_space(base: Resolved, axes: Sequence[Axis]) -> None:
    """Every key is one of the recipe, and every value fits it on its own.

    Raises:
        UsageError: names the key and the value.
    """
    for axis in axes:
        for text in axis.samples():
            try:
                with_settings(base, {axis.key: text})
            except UsageError as error:
                fix = f"{error.fix}; whole numbers are low..high:int" if isinstance(axis, Range) else error.fix
                raise UsageError(error.what, where=f"--space {axis.key}, value {text}", fix=fix) from error


def _axis(text: str) -> Axis:
    key, equals, values = text.partition("=")
    key, values = key.strip(), values.strip()
    if not equals or not all(key.split(".")):
        raise UsageError(f"--space takes a.b=values, got {text!r}", fix=EXAMPLE)
    found = RANGE.fullmatch(values)
    if found:
        ends = [_number(end) for end in found.groups()[:2]]
        if None not in ends:
            return _range(text, key, [str(e) for e in found.groups()[:2]], found.group(3).split(":")[1:])
        if ends != [None, None]:
            raise UsageError(f"--space {text!r}: both ends of a range are numbers", fix=EXAMPLE)
    return _choices(text, key, values)


def _choices(text: str, key: str, values: str) -> Choices:
    texts = tuple(part.strip() for part in _split(values))
    if not all(texts):
        raise UsageError(f"--space {text!r} has an empty value", fix=EXAMPLE)
    plain = [repr(parse_scalar(t)) for t in texts]
    if len(set(plain)) < len(plain):
        raise UsageError(f"--space {text!r} has a value twice", fix="give each value once")
    return Choices(key, texts)


def _range(text: str, key: str, ends: Sequence[str], flags: Sequence[str]) -> Axis:
    low, high = (float(parse_scalar(end)) for end in ends)
    points = [f for f in flags if f.isdigit()]
    unknown = next((f for f in flags if f not in (*FLAGS, *points)), None)
    if unknown is not None or len(points) > 1:
        said = (
            f"{unknown!r} is unknown; {did_you_mean(unknown, FLAGS)}" if unknown else "more than one number of points"
        )
        raise UsageError(f"--space {text!r}: {said}", fix="low..high:log, low..high:int or low..high:5 for five points")
    log, whole = "log" in flags, "int" in flags
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--space {text!r}: a range runs from low to high", fix=f"--space {key}={ends[1]}..{ends[0]}")
    if log and low <= 0:
        raise UsageError(f"--space {text!r}: a :log range begins above 0", fix="a small low end, such as 1e-6")
    both_whole = all(isinstance(parse_scalar(end), int) for end in ends)
    if whole and not both_whole:
        raise UsageError(
            f"--space {text!r}: the ends of an :int range are whole numbers", fix=f"--space {key}=1..8:int"
        )
    if points:
        return _choices(text, key, ",".join(_points(low, high, int(points[0]), log, whole)))
    if both_whole and not whole:
        raise UsageError(
            f"--space {text!r}: whole numbers only, or any number?",
            fix=f"{key}={ends[0]}..{ends[1]}:int, or {key}={float(low)}..{float(high)}",
        )
    return Range(key, low, high, log, whole)


def _points(low: float, high: float, count: int, log: bool, whole: bool) -> list[str]:
    """Evenly spaced points, as texts; of whole numbers each once."""
    if count < 2:
        raise UsageError("a range of points has at least 2", fix="low..high:5 for five points")
    shares = [i / (count - 1) for i in range(count)]
    values = [low * (high / low) ** s if log else low + (high - low) * s for s in shares]
    texts = [str(round(v)) if whole else repr(float(f"{v:.{POINT_DIGITS}g}")) for v in values]
    return list(dict.fromkeys(texts))


def _number(text: str) -> float | None:
    value = parse_scalar(text)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        depth += (c in "[{(") - (c in ")}]") if not quote else 0
        if c == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def values_of(settings: Mapping[str, str]) -> dict[str, Any]:
    """The values that the texts stand for."""
    return {k: parse_scalar(v) for k, v in settings.items()}
