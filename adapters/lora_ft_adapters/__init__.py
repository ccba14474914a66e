"""Adapters for any `nn.Module`: build one by name, apply it, see what trains.

    import lora_ft_adapters as adapters
    model = adapters.add_adapter(model, adapters.build_config("lora", {"r": 8}))

Needs torch and peft, and nothing of lora_ft. Names are resolved on first use, so that importing the package, or
its `errors`, does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apply import add_adapter, count_parameters, load_adapter, trainable
    from .errors import AdapterError
    from .registry import Method, build_config, list_methods, register
    from .targets import check_targets

_HOMES = {
    "AdapterError": "errors", "Method": "registry", "add_adapter": "apply", "build_config": "registry",
    "check_targets": "targets", "count_parameters": "apply", "load_adapter": "apply", "list_methods": "registry",
    "register": "registry",
    "trainable": "apply",
}  # fmt: skip

__all__ = [
    "AdapterError",
    "Method",
    "add_adapter",
    "build_config",
    "check_targets",
    "count_parameters",
    "list_methods",
    "load_adapter",
    "register",
    "trainable",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
