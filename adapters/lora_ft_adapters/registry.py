"""Every adapter method by name: PEFT's own types, described by PEFT, and the files of `methods/`."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from .behaviour import behaviour_of, quiet
from .check import check_convolutions, check_names, check_ties, check_values
from .errors import AdapterError, did_you_mean
from .plugin import WRITTEN, AdapterConfig
from .shapes import Fit
from .targets import all_linear, body, resolve_targets

# Set by PEFT or by us while the adapter is built and saved; never a user's choice.
_NOT_OPTIONS = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One way to adapt a frozen model.

    Attributes:
        name: what a recipe's `method.type` says.
        description: one sentence.
        config_class: the PEFT config class whose fields are the method's options.
        defaults: options that differ from PEFT's own defaults, with the reason in the file that sets them.
        fixed: options that make the method what it is; another value is refused.
        targets: `target_modules` when the user names none; None when the config finds its own. With "body" the linear
            layers and, in convolutional models, the convolutions; "all-linear" where the model is not known yet.
        fit: values for options the user left out that depend on the model's shapes: (options, model) -> values.
        lr_scales: parts of parameter names -> factor on the learning rate.
        family: heading under which it is listed.
        refusal: why it cannot be trained here, or "".
    """

    name: str
    description: str
    config_class: type[PeftConfig]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    targets: str | None = "all-linear"
    fit: Fit | None = None
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    family: str = "PEFT"
    refusal: str = ""

    @property
    def plug_in(self) -> bool:
        """Whether stock PEFT knows it only after this package has registered it."""
        return issubclass(self.config_class, AdapterConfig)

    def options(self) -> list[str]:
        """The names that a recipe may set."""
        fields = [f for f in dataclasses.fields(self.config_class) if f.init and not f.metadata.get(WRITTEN)]
        return [f.name for f in fields if f.name not in _NOT_OPTIONS]


_OWN: dict[str, Method] = {}
# The same method under another name; PEFT keeps BONE for old files only, MiSS is its name now.
_RETIRED = {"bone"}


def register(method: Method) -> Method:
    """Add a method, or replace how PEFT's type of the same name is offered. A second registration raises."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", method.name):
        raise ValueError(f"method name {method.name!r} must be lower case letters, digits and underscores")
    if method.name in _OWN:
        raise ValueError(f"method {method.name!r} is registered twice")
    _OWN[method.name] = method
    return method


@cache
def list_methods() -> dict[str, Method]:
    """All methods by name, ours over PEFT's own of the same name; plug-ins come through `lora_ft.methods`."""
    package = importlib.import_module("lora_ft_adapters.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group="lora_ft.methods"):
        point.load()
    found: dict[str, Method] = {}
    taken = {m.config_class for m in _OWN.values()}
    for peft_type, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(peft_type.value).lower()
        if name not in _RETIRED and (name in _OWN or config_class not in taken):
            found[name] = Method(name, _summary(PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type), config_class), config_class)
    return dict(sorted((found | _OWN).items()))


def _summary(tuner: type | None, config_class: type) -> str:
    for owner in (tuner, config_class):
        text = inspect.cleandoc(owner.__dict__.get("__doc__") or "") if owner else ""
        first = re.split(r"(?<=[.!])\s|\n\n", text)[0].replace("\n", " ").strip()
        if first and not first.startswith("This is the configuration class") and "(" not in first[:25]:
            return re.sub(r"\s+", " ", re.sub(r"\[?`+([^`]*)`+\]?", r"\1", first))[:160]
    return f"{config_class.__name__.removesuffix('Config')}, as PEFT implements it."


def find_method(name: str) -> Method:
    """The method called `name`; an AdapterError with the nearest names when there is none, or it cannot train."""
    known = list_methods()
    if name not in known:
        raise AdapterError(f"unknown method {name!r}; {did_you_mean(name, known)}", "lora-ft list methods")
    if known[name].refusal:
        raise AdapterError(f"method {name!r} cannot be trained here: {known[name].refusal}", "lora-ft list methods")
    return known[name]


def build_config(
    name: str, options: Mapping[str, Any], task_type: str | None = None, model: nn.Module | None = None
) -> PeftConfig:
    """The PEFT config of method `name` with `options` over its defaults.

    Args:
        name: of the method.
        options: of its config class, as a user wrote them; target_modules may hold globs, types and layer ranges.
        task_type: PEFT's name for the task.
        model: what it will be put on; options the user left out are chosen to fit its shapes, and targets resolved.

    Raises:
        AdapterError: an unknown method or option (with the nearest names), a value that PEFT refuses, or a target
            that matches nothing.
    """
    method = find_method(name)
    allowed = method.options()
    unknown = [o for o in options if o not in allowed]
    if unknown:
        hints = "; ".join(f"{o!r}: {did_you_mean(o, allowed)}" for o in unknown)
        raise AdapterError(f"method {name!r} has no option {hints}", "remove it or use the name that PEFT uses")
    wrong = [o for o in options if o in method.fixed and options[o] != method.fixed[o]]
    if wrong:
        raise AdapterError(f"method {name!r} is {wrong[0]}={method.fixed[wrong[0]]!r}, not {options[wrong[0]]!r}")
    check_values(f"method {name!r}", method.config_class, options)
    values = {**method.defaults, **options, **method.fixed}
    if "target_modules" in allowed and values.get("target_modules") is None and not values.get("target_parameters"):
        values["target_modules"] = _default_targets(method, values, model)
    if model is not None:
        _settle(method, values, options, model)
        check_names(model, SimpleNamespace(**values))
    config = _construct(method, values, task_type)
    if model is not None and not method.plug_in:
        check_ties(model, config)
        check_convolutions(model, config)
    return config


def corrects_quantisation(name: str, options: Mapping[str, Any]) -> bool:
    """Whether an adapter of this method holds the error of its quantised base, and so fits no other."""
    return behaviour_of(build_config(name, options)).corrects_quantisation


def _default_targets(method: Method, values: Mapping[str, Any], model: nn.Module | None) -> str | list[str] | None:
    """All layers, which beat attention only at equal size (Schulman 2025).

    Raises:
        AdapterError: the model has no layer of the kind.
    """
    if method.targets not in ("body", "all-linear") or model is None:
        return "all-linear" if method.targets == "body" else method.targets
    linear, convolutions, complete = body(model, values.get("modules_to_save"))
    if method.targets == "body" and convolutions:
        return [*linear, *convolutions]
    if linear and not complete:
        return linear
    if not linear and not isinstance(values.get("exclude_modules"), str):
        raise AdapterError(
            f"method {method.name!r} works on linear layers, and this model has none in its body",
            "lora, houlsby, layers or full, which take convolutions too; or target_modules",
        )
    return "all-linear"


def _settle(method: Method, values: dict[str, Any], options: Mapping[str, Any], model: nn.Module) -> None:
    """Resolve targets on the model and choose what depends on its shapes."""
    targets = values.get("target_modules")
    if targets is not None:
        values["target_modules"] = resolve_targets(model, targets)
    if method.fit is not None:
        view = {**values, "target_modules": all_linear(model)} if targets == "all-linear" else values
        chosen = method.fit(view, model)
        values.update({k: v for k, v in chosen.items() if options.get(k) is None})


def _construct(method: Method, values: Mapping[str, Any], task_type: str | None) -> PeftConfig:
    try:
        with quiet():
            return method.config_class(task_type=task_type, **values)
    except ImportError as error:
        raise AdapterError(
            f"method {method.name!r} with these options: {error}", "pip install the package it names"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"method {method.name!r} refuses these options: {error}",
            "see the paper" if method.plug_in else "see PEFT's documentation",
        ) from error
