"""Adapters for any `nn.Module`: build one by name, apply it, see what trains, switch, save, merge and combine.

    import lora_ft_adapters as adapters
    model = adapters.add_adapter(model, adapters.build_config("lora", {"r": 8}, model=model))

Needs torch and peft, and nothing of lora_ft. Names are resolved on first use, so that importing the package, or
its `errors`, does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apply import (
        active,
        add_adapter,
        count_parameters,
        load_adapter,
        save_adapter,
        state_of,
        trainable,
        unsaved,
    )
    from .behaviour import Calibration
    from .errors import AdapterError, UnmergeableError
    from .merging import merge, merged
    from .modes import training_mode
    from .registry import Method, build_config, list_methods, register
    from .swapping import AdapterSlot
    from .targets import check_targets, resolve_targets

_HOMES = {
    "apply": (
        "active", "add_adapter", "count_parameters", "load_adapter", "save_adapter", "state_of",
        "trainable", "unsaved",
    ),
    "behaviour": ("Calibration",),
    "errors": ("AdapterError", "UnmergeableError"),
    "merging": ("merge", "merged"),
    "modes": ("training_mode",),
    "registry": ("Method", "build_config", "list_methods", "register"),
    "swapping": ("AdapterSlot",),
    "targets": ("check_targets", "resolve_targets"),
}  # fmt: skip

__all__ = [
    "AdapterError",
    "AdapterSlot",
    "Calibration",
    "Method",
    "UnmergeableError",
    "active",
    "add_adapter",
    "build_config",
    "check_targets",
    "count_parameters",
    "list_methods",
    "load_adapter",
    "merge",
    "merged",
    "register",
    "resolve_targets",
    "save_adapter",
    "state_of",
    "trainable",
    "training_mode",
    "unsaved",
]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
