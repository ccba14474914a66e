"""Options that PEFT would take without a word and then ignore, or fail on much later."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from .blocks import stacks
from .errors import AdapterError, did_you_mean
from .modules import embedding_ends
from .targets import check_targets, plain_modules

_PLAIN = (bool, int, float, str, list, tuple, set, dict, type(None))


def check_values(what: str, config_class: type, values: Mapping[str, Any]) -> None:
    """Refuse a value of another type than the config class declares.

    `use_dora: no` is the text "no" in YAML 1.2, and any text switches an option on.

    Raises:
        AdapterError: names each option, what it is and what it may be.
    """
    try:
        hints = typing.get_type_hints(config_class)
    except (NameError, TypeError):  # annotations of a config elsewhere that only its own module can read
        return
    wrong = []
    for name, value in values.items():
        hint = hints.get(name, Any)
        nested = [h for h in _members(hint) if dataclasses.is_dataclass(h)]
        if isinstance(value, Mapping) and nested and isinstance(nested[0], type):
            _check_nested(f"{what}.{name}", nested[0], value)
        elif not _fits(value, hint):
            wrong.append(f"{name} is {value!r}, not {_say(hint)}")
    if wrong:
        raise AdapterError(f"{what}: " + "; ".join(wrong), "in YAML, yes and no are texts: write true or false")


def _check_nested(what: str, config_class: type, values: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(config_class)]
    unknown = [k for k in values if k not in known]
    if unknown:
        raise AdapterError(f"{what} has no option {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
    check_values(what, config_class, values)


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type; types that are not plain data fit always."""
    for member in _members(hint):
        origin = typing.get_origin(member) or member
        if origin is typing.Literal:
            # PEFT's lists of words are not complete ("pissa_niter_16"); it checks words itself.
            if any(type(a) is type(value) for a in typing.get_args(member)):
                return True
        elif origin not in _PLAIN or _is(value, origin):
            return True
    return False


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind in (int, float):
        return isinstance(value, int | float) and (kind is float or float(value).is_integer())
    if kind in (list, tuple, set):
        return isinstance(value, list | tuple | set | frozenset)
    return isinstance(value, kind)


def _say(hint: Any) -> str:
    names = [getattr(typing.get_origin(m) or m, "__name__", str(m)) for m in _members(hint)]
    # The order is ours: Python interns unions, so that of `str | list` hangs on which was written first in the process.
    return " or ".join(sorted(n for n in names if n != "NoneType"))


def check_names(model: nn.Module, options: Any) -> None:
    """Refuse an option that names modules, parameters or blocks which the model does not have.

    Args:
        model: bare or adapted.
        options: a PEFT config, or anything with its attributes.
    """
    names = [n for n, _ in plain_modules(model)]
    excluded = getattr(options, "exclude_modules", None)
    for option, entries in (
        ("modules_to_save", getattr(options, "modules_to_save", None)),
        ("exclude_modules", excluded),
    ):
        if isinstance(entries, str) and option == "exclude_modules":
            _need(option, entries, any(re.fullmatch(entries, n) for n in names))
        elif entries:
            check_targets(model, entries, option)
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(options, option, None) or {}
        for key in patterns if isinstance(patterns, Mapping) else ():
            _need(option, key, any(re.match(rf"(.*\.)?({key})$", n) for n in names) or _is_state(patterns))
    tensors = [n.replace(".base_layer", "") for n, _ in model.named_parameters()]
    for entry in getattr(options, "target_parameters", None) or ():
        _need("target_parameters", entry, any(n == entry or n.endswith(f".{entry}") for n in tensors))
    _check_blocks(model, getattr(options, "layers_to_transform", None))


def _is_state(pattern: Mapping[str, Any]) -> bool:
    """AdaLoRA keeps what it has pruned under the same name."""
    return any(isinstance(v, list) for v in pattern.values())


def _check_blocks(model: nn.Module, numbers: int | Iterable[int] | None) -> None:
    if numbers is None:
        return
    wanted = [numbers] if isinstance(numbers, int) else list(numbers)
    most = max((b.index for b in stacks(model)), default=-1)
    beyond = [n for n in wanted if not -most - 1 <= n <= most]
    if beyond:
        raise AdapterError(f"layers_to_transform: there is no block {beyond[0]}; the model has blocks 0 to {most}")


def _need(option: str, entry: str, found: bool) -> None:
    if not found:
        raise AdapterError(f"{option}: {entry!r} matches nothing in this model", "names as in target_modules")


def check_ties(model: nn.Module, config: Any) -> None:
    """Refuse to adapt one of two layers that share a weight: a merged change would reach both.

    Raises:
        AdapterError: a target is the input embedding or the output head of a model that ties them.
    """
    if getattr(config, "ensure_weight_tying", False) or isinstance(getattr(config, "target_modules", None), str | None):
        return
    ends = embedding_ends(model)
    weights = [getattr(e, "weight", None) for e in ends]
    if weights[0] is None or weights[0] is not weights[1]:
        return
    tied = [n for n, m in plain_modules(model) if m in ends and _is_target(n, config.target_modules)]
    if tied:
        raise AdapterError(
            f"{tied[0]} shares its weight with the other end of the model, so a change of it could never be merged",
            "leave it out, or ensure_weight_tying: true",
        )


def check_convolutions(model: nn.Module, config: Any) -> None:
    """Refuse LoRA on a convolution that PEFT would copy wrongly.

    PEFT's LoRA layer has the kernel, stride and padding of the base's, but neither its dilation nor its padding mode.

    Raises:
        AdapterError: a target has one of these.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(config, LoraConfig) or not targets or isinstance(targets, str):
        return
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    named = [(n, m) for n, m in plain_modules(model) if isinstance(m, kinds) and _is_target(n, targets)]
    for name, module in named:
        if set(module.dilation) != {1} or module.padding_mode != "zeros":
            what = f"dilation {module.dilation} and padding_mode {module.padding_mode!r}"
            raise AdapterError(f"{name} has {what}, which PEFT's LoRA ignores", "leave it out, or houlsby or layers")


def _is_target(name: str, targets: Iterable[str]) -> bool:
    return any(name == t or name.endswith(f".{t}") for t in targets)
