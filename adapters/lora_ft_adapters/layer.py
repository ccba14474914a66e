"""The wrapper that carries adapters on one module of the base, for the methods that PEFT lacks."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .errors import AdapterError


def _nothing(*_: object) -> None:
    """A hook that tells torch's fused `nn.TransformerEncoder` that it must call its layers."""


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module of the base with adapters by name; all it does to the base module is call it.

    Each adapter is a module `delta(y, x)`: y (..., F) the output in the adapter's dtype, x the module's first input;
    what it returns is added to y. Several active adapters act in their order, each on the result of the one before.
    """

    prefix: ClassVar[str]
    cannot_merge: ClassVar[str] = "it is not a linear change of one layer's weights"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = (cls.prefix,)

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.add_module(self.prefix, nn.ModuleDict())
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self.training = base_layer.training
        self.register_forward_pre_hook(_nothing)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (`block.attention_type`, `layer.in_features`).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters by name."""
        found = self._modules[self.prefix]
        assert isinstance(found, nn.ModuleDict)
        return found

    def add(self, name: str, adapter: nn.Module) -> None:
        """Put one more adapter beside the others."""
        self.adapters[name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(name)

    def running(self) -> list[str]:
        """Names of the adapters that act in a forward now, in their order."""
        if self.disable_adapters or self.merged:
            return []
        return [n for n in self.active_adapters if n in self.adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with every active adapter's change."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        names = self.running()
        if not names:
            return output
        source = args[0] if args else next(iter(kwargs.values()), None)
        return on_tensor(output, lambda y: self.adapt(names, y, source))

    def adapt(self, names: Sequence[str], y: Tensor, source: Any) -> Tensor:
        """Add what each adapter computes, in its dtype, and cast the sum back."""
        dtype = y.dtype
        for name in names:
            adapter = self.adapters[name]
            y = y.to(next(adapter.parameters()).dtype)
            y = y + adapter(y, source)
        return y.to(dtype)

    def merge_refusal(self) -> str | None:
        """Why this layer cannot be merged, or None."""
        return self.cannot_merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, unless a method knows how."""
        raise NotImplementedError(f"this adapter cannot be merged: {self.merge_refusal()}")

    def unmerge(self) -> None:
        """Nothing was merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but a loaded float32 adapter stays float32 on a bf16 base."""
        if adapter_name not in self.adapters:
            return
        base = next(iter(self.base_layer.parameters()), None)
        device = device or (base.device if base is not None else None)
        adapter = self.adapters[adapter_name]
        if any(t.device.type == "meta" for t in adapter.parameters()):
            return
        double = base is not None and base.dtype == torch.float64
        adapter.to(device=device, dtype=torch.float64 if double else torch.float32)


def on_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a module's output, or to the first element of a tuple or list of outputs."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        rest = [change(output[0]), *output[1:]]
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    raise AdapterError(f"an adapted module returned {type(output).__name__}, which has no first tensor to adapt")


def first_tensor(value: Any) -> Tensor:
    """The tensor, or the first element of a tuple or list of tensors, that a module was given."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, Tensor):
        return value
    raise AdapterError(f"an adapted module was given {type(value).__name__} first, not a tensor")
