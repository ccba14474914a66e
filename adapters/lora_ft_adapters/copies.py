"""Copies of a module's own parameters and buffers, by adapter name, that run in place of the originals."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from .layer import AdapterLayer, first_tensor, on_tensor

COPY = "lft_unfrozen_"


def is_copy(name: str) -> bool:
    """Whether a parameter of this name is a trained copy of one of the base's own."""
    return f".{COPY}" in name


def _plus(change: Tensor, y: Tensor) -> Tensor:
    return (y.to(change.dtype) + change).to(y.dtype)


class Copy(nn.Module):
    """One adapter's own parameters and buffers for one module; those in `ties` are another layer's."""

    def __init__(self, base: nn.Module, ties: dict[str, tuple["CopyLayer", str]]) -> None:
        super().__init__()
        self.ties = ties
        for name, value in base.named_parameters(recurse=False):
            if name not in ties:
                dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
                self.register_parameter(name, nn.Parameter(value.detach().to(dtype, copy=True)))
        for name, buffer in saved_buffers(base):
            self.register_buffer(name, buffer.detach().clone())


class Beside(nn.Module):
    """up(gelu(down(x))): (..., in) -> (..., out), zero at the start."""

    def __init__(self, in_features: int, inner: int, out_features: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(in_features, inner), nn.Linear(inner, out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What to add to the head's output."""
        y: Tensor = self.up(nn.functional.gelu(self.down(x)))
        return y


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Own buffers that a checkpoint has."""
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


class CopyLayer(AdapterLayer):
    """A module that runs with the copies of its own parameters."""

    prefix = COPY
    cannot_merge = "the MLP beside the head has no place in the base"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.originals: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        # Models also read weights without calling the module (`embed.weight`, `out_proj.weight` of attention).
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and base._parameters.get(name) is not None:
            return self.current(name)
        return super().__getattr__(name)

    @property
    def weight(self) -> Any:
        """The weight that a forward now would use."""
        return self.current("weight")

    @property
    def bias(self) -> Any:
        """The bias that a forward now would use."""
        return self.current("bias")

    def current(self, name: str) -> Any:
        """The active copy of a parameter, or whatever the base module has under this name."""
        names = self.running()
        if names and self.base_layer._parameters.get(name) is not None:
            return self.value(names, name)
        return getattr(self.base_layer, name)

    def copy_of(self, adapter_name: str, key: str) -> Tensor:
        """The trained parameter, which may be another layer's."""
        copy = self.adapters[adapter_name]
        assert isinstance(copy, Copy)
        layer, key = copy.ties.get(key, (self, key))
        found: Tensor = layer.adapters[adapter_name].get_parameter(key)
        return found

    def value(self, names: Sequence[str], key: str) -> Tensor:
        """The parameter to run with, in the base's dtype."""
        original: Tensor = self.originals[key] if key in self.originals else self.base_layer.get_parameter(key)
        copies = [self.copy_of(n, key) for n in names]
        if len(copies) == 1:
            return copies[0].to(original.dtype)
        whole = original.to(copies[0].dtype)
        together: Tensor = whole + sum(c - whole for c in copies)
        return together.to(original.dtype)

    def values(self, names: Sequence[str]) -> dict[str, Tensor]:
        """All own parameters and buffers to run with; buffers are those of the first active adapter."""
        found = {key: self.value(names, key) for key, p in self.base_layer._parameters.items() if p is not None}
        return found | dict(self.adapters[names[0]].named_buffers(recurse=False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward with the copies in place of its parameters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.running()
        if not names:
            return self.base_layer(*args, **kwargs)
        output = functional_call(self.base_layer, self.values(names), args, kwargs, tie_weights=False)
        for name in names:
            beside = self.adapters[name]._modules.get("beside")
            if beside is not None:
                source = first_tensor(args or tuple(kwargs.values()))
                change = beside(source.to(next(beside.parameters()).dtype))
                output = on_tensor(output, partial(_plus, change))
        return output

    def merge_refusal(self) -> str | None:
        """Only an MLP beside the head is in the way."""
        return self.cannot_merge if any("beside" in a._modules for a in self.adapters.values()) else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the copies into the base module; ties among adapted modules stay ties."""
        if self.merge_refusal():
            super().merge()
        new = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]
        if not new:
            return
        names = [*self.merged_adapters, *new]
        base = self.base_layer
        with torch.no_grad():
            values = {k: v.detach().clone() for k, v in self.values(names).items()}
        if safe_merge and not all(bool(torch.isfinite(v).all()) for v in values.values()):
            raise ValueError(f"the weights of {', '.join(names)} are not finite")
        for key, value in values.items():
            home: dict[str, Any] = base._parameters if key in base._parameters else base._buffers
            self.originals.setdefault(key, home[key])
            home[key] = self._merged(names[0], key, value) if key in base._parameters else value
        self.merged_adapters.extend(new)

    def _merged(self, name: str, key: str, value: Tensor) -> nn.Parameter:
        copy = self.adapters[name]
        assert isinstance(copy, Copy)
        owner, owner_key = copy.ties.get(key, (self, key))
        if owner is not self and owner.merged:
            shared = owner.base_layer._parameters[owner_key]
            assert shared is not None
            return shared
        return nn.Parameter(value, requires_grad=False)

    def unmerge(self) -> None:
        """Put the base's own tensors back."""
        for key, value in self.originals.items():
            home: dict[str, Any] = self.base_layer._buffers
            if key in self.base_layer._parameters:
                home = self.base_layer._parameters
            home[key] = value
        self.originals.clear()
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As the base class, but buffers keep the base's dtypes: running code writes into them."""
        base = next(chain(self.base_layer.parameters(), self.base_layer.buffers()), None)
        if adapter_name not in self.adapters or base is None:
            return
        parameters = list(self.adapters[adapter_name].parameters())
        if any(t.device.type == "meta" for t in (base, *parameters)):
            return
        for p in parameters:
            wide = torch.float64 if base.dtype == torch.float64 else torch.float32
            p.data = p.data.to(device or base.device, wide)
        for copy in self.adapters[adapter_name].modules():
            for name, buffer in copy.named_buffers(recurse=False):
                copy._buffers[name] = buffer.to(device or base.device)
