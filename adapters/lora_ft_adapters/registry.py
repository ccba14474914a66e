"""Every adapter method by name: PEFT's own types, described by PEFT, and the files of `methods/`."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .errors import AdapterError, did_you_mean

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
    """

    name: str
    description: str
    config_class: type[PeftConfig]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> list[str]:
        """The names that a recipe may set."""
        return [f.name for f in dataclasses.fields(self.config_class) if f.init and f.name not in _NOT_OPTIONS]


_OWN: dict[str, Method] = {}


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
    """All methods by name, ours over PEFT's own of the same name."""
    package = importlib.import_module("lora_ft_adapters.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found: dict[str, Method] = {}
    for peft_type, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(peft_type.value).lower()
        found[name] = Method(name, _summary(PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type), config_class), config_class)
    return dict(sorted((found | _OWN).items()))


def _summary(tuner: type | None, config_class: type) -> str:
    for owner in (tuner, config_class):
        text = inspect.cleandoc(owner.__dict__.get("__doc__") or "") if owner else ""
        first = re.split(r"(?<=[.!])\s|\n\n", text)[0].replace("\n", " ").strip()
        if first and not first.startswith("This is the configuration class") and "(" not in first[:25]:
            return re.sub(r"\s+", " ", re.sub(r"\[?`+([^`]*)`+\]?", r"\1", first))[:160]
    return f"{config_class.__name__.removesuffix('Config')}, as PEFT implements it."


def build_config(name: str, options: Mapping[str, Any], task_type: str | None = None) -> PeftConfig:
    """The PEFT config of method `name` with `options` over its defaults.

    Raises:
        AdapterError: an unknown method or option (with the nearest names), or a value that PEFT refuses.
    """
    known = list_methods()
    if name not in known:
        raise AdapterError(f"unknown method {name!r}; {did_you_mean(name, known)}", "lora-ft list methods")
    method = known[name]
    allowed = method.options()
    unknown = [o for o in options if o not in allowed]
    if unknown:
        hints = "; ".join(f"{o!r}: {did_you_mean(o, allowed)}" for o in unknown)
        raise AdapterError(f"method {name!r} has no option {hints}", "remove it or use the name that PEFT uses")
    values = {**method.defaults, **options}
    if "target_modules" in allowed and values.get("target_modules") is None and not values.get("target_parameters"):
        values["target_modules"] = "all-linear"  # all layers beat attention-only at equal parameters (Schulman 2025)
    try:
        return method.config_class(task_type=task_type, **values)
    except ImportError as error:
        raise AdapterError(
            f"method {name!r} with these options: {error}", "pip install the package it names"
        ) from error
    except (TypeError, ValueError) as error:
        raise AdapterError(f"method {name!r} refuses these options: {error}", "see PEFT's documentation") from error
