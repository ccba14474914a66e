"""The model that an operation aims at: changes added to the weights themselves, to compare a written LoRA with."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError

from .deltas import Delta, LayerDelta, TokenDelta


def expecting(model: nn.Module, deltas: Iterable[tuple[str, Delta]]) -> Iterator[tuple[str, Delta]]:
    """Pass changes on and add each to `model` (a tree made by `share`, whose own weights are replaced, not written)."""
    for name, delta in deltas:
        apply_delta(model, name, delta)
        yield name, delta


@torch.no_grad()
def apply_delta(model: nn.Module, name: str, delta: Delta) -> None:
    """Give one module W + dW, as a PEFT adapter would: layers that share its weight keep theirs, but for token rows.

    Raises:
        AdapterError: the model has no such module, or one of another shape.
    """
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"the base has no module {name!r}: the adapter is one of another model") from error
    if isinstance(delta, LayerDelta):
        if tuple(module.weight.shape) != delta.layout.shape:
            raise AdapterError(f"{name} has shape {tuple(module.weight.shape)}, the change {delta.layout.shape}")
        _set(module, "weight", module.weight.double() + delta.weight().to(module.weight.device), module.weight)
        if delta.bias is not None:
            old = module.bias if module.bias is not None else torch.zeros_like(delta.bias, dtype=module.weight.dtype)
            _set(module, "bias", old.double() + delta.bias.to(old.device), old)
    elif isinstance(delta, TokenDelta):
        old = module.weight
        new = old.detach().clone()
        new[list(delta.rows)] = delta.copy().to(new)
        for other in [m for m in model.modules() if getattr(m, "weight", None) is old]:
            _set(other, "weight", new, old)  # PEFT ties token rows where the model ties its weights
    else:
        for own, tensor in delta.copy().items():
            inside, _, last = own.rpartition(".")
            owner = module.get_submodule(inside)
            _set(owner, last, tensor, getattr(owner, last))


def _set(module: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    value = value.to(like)
    setattr(module, name, value if name in dict(module.named_buffers(recurse=False)) else nn.Parameter(value, False))
