"""Which weights an adapter was trained on: a hash that is the same in float32 and bfloat16."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft_adapters.weights import Weights

VALUES = 64  # sampled from each parameter


def fingerprint(model: nn.Module, fresh: Collection[str] = (), dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, shapes and evenly spaced values, rounded to bfloat16, of the frozen parameters.

    Quantised weights are hashed as they are stored, so one base has one fingerprint per quantiser.

    Args:
        model: the plain base.
        fresh: names of modules that are not in its files and start at random; they are left out.
        dtype: that of the model whose fingerprint this one is compared with; float16 rounds before bfloat16 does.
    """

    def values(parameter: Tensor, index: Tensor) -> Tensor:
        return parameter.detach().flatten()[index.to(parameter.device)].cpu()

    held = {n: t for name, p in model.named_parameters() for n, t in _parts(name, p)}
    return _digest({n: (tuple(t.shape), partial(values, t)) for n, t in held.items()}, fresh, dtype)


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or those that one of a kind of its own (torchao's) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for own in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{own}", getattr(tensor, own))


def fingerprint_of_files(
    model: nn.Module, weights: Weights, fresh: Collection[str] = (), dtype: torch.dtype | None = None
) -> str:  # fmt: skip
    """The same of a model without numbers, whose tensors are in files.

    Args:
        model: its modules.
        weights: their tensors by name.
        fresh, dtype: as for `fingerprint`.
    """
    names = [n for n, _ in model.named_parameters() if n in weights]
    return _digest({n: (weights.shape(n), partial(weights.values_at, n)) for n in names}, fresh, dtype)


def _digest(
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]], fresh: Collection[str],
    dtype: torch.dtype | None,
) -> str:  # fmt: skip
    digest = hashlib.sha256()
    for name, (shape, values) in tensors.items():
        if any(name.startswith(f"{module}.") for module in fresh):
            continue
        digest.update(f"{name}{shape}".encode())
        size = math.prod(shape)
        count = min(VALUES, size)
        found = values(torch.arange(count) * (size - 1) // max(1, count - 1))
        found = found.to(dtype) if dtype is not None and found.is_floating_point() else found
        digest.update(found.float().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
