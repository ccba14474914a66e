"""Sizes of the layers that an adapter will wrap, for options that must fit them."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from . import modules
from .targets import matches, plain_modules


def targeted(model: nn.Module, target_modules: str | Iterable[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules that `target_modules` (PEFT's rules) chooses, by name."""
    named = plain_modules(model)
    if target_modules is None:
        return named
    if isinstance(target_modules, str):
        return [(n, m) for n, m in named if re.fullmatch(target_modules, n)]
    entries = list(target_modules)
    whole = set(entries)  # a list of whole names, the usual case, needs no search
    return [(n, m) for n, m in named if n in whole or any(matches(e, n) for e in entries)]


def linear_sizes(model: nn.Module, target_modules: str | Iterable[str] | None) -> list[tuple[int, int]]:
    """(inputs, outputs) of every targeted linear layer; all linear layers when nothing is targeted."""
    return [modules.linear_sizes(m) for _, m in targeted(model, target_modules) if modules.is_linear(m)]


Fit = Callable[[Mapping[str, Any], nn.Module], dict[str, Any]]


def at_most(option: str, wanted: int, room: Callable[[int, int], int]) -> Fit:
    """An option that is `wanted`, or what every targeted layer (inputs, outputs) has room for."""

    def fit(view: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        sizes = linear_sizes(model, view.get("target_modules"))
        return {option: max(1, min([wanted, *(room(i, o) for i, o in sizes)]))}

    return fit


def divides(option: str, limit: int, *, inputs: bool = True, outputs: bool = True) -> Fit:
    """An option that is the largest number up to `limit` that divides the sizes of every targeted layer."""

    def fit(view: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        sizes = linear_sizes(model, view.get("target_modules"))
        whole = math.gcd(*[i for i, _ in sizes if inputs], *[o for _, o in sizes if outputs]) or limit
        return {option: max(d for d in range(1, min(whole, limit) + 1) if whole % d == 0)}

    return fit
