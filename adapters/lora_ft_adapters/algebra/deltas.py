"""What an adapter changes: one record for each module, in float64 and in the layout in which LoRA multiplies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError


@dataclass(frozen=True)
class Layout:
    """How the weight of a layer becomes the matrix (out, in) that `B @ A` of LoRA adds to.

    Attributes:
        kind: linear, conv1d (Transformers' transposed Conv1D), conv or embedding.
        shape: of the weight.
        has_bias: whether the layer has one.
    """

    kind: str
    shape: tuple[int, ...]
    has_bias: bool

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, in); kernels are flattened into `in`."""
        if self.kind in ("conv1d", "embedding"):
            return weight.T
        return weight.flatten(1) if self.kind == "conv" else weight

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.kind in ("conv1d", "embedding"):
            return matrix.T
        return matrix.reshape(self.shape)


def layout_of(layer: nn.Module, name: str) -> Layout:
    """The layout of a base layer.

    Raises:
        AdapterError: a kind of layer, or options of a convolution, that a LoRA of PEFT cannot express.
    """
    kind = _kind(layer)
    if kind is None:
        raise AdapterError(f"{name} is a {type(layer).__name__}, which no LoRA of PEFT can express")
    if kind == "conv":
        _check_conv(layer, name)
    weight: Any = layer.weight
    shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)  # 4-bit weights are stored flat
    return Layout(kind, tuple(shape), getattr(layer, "bias", None) is not None)


def _kind(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    # Transformers' class, by name because this package does not import Transformers.
    return "conv1d" if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") else None


def _check_conv(layer: nn.Module, name: str) -> None:
    # PEFT's LoRA gives lora_A the kernel, stride and padding of the base only.
    odd = {
        "groups": getattr(layer, "groups", 1) != 1,
        "dilation": any(d != 1 for d in getattr(layer, "dilation", ())),
        "padding_mode": getattr(layer, "padding_mode", "zeros") != "zeros",
    }
    wrong = [f"{k}={getattr(layer, k)}" for k, is_odd in odd.items() if is_odd]
    if wrong:
        raise AdapterError(f"{name} is a convolution with {', '.join(wrong)}, which PEFT's LoRA does not reproduce")


@dataclass(frozen=True)
class LayerDelta:
    """Change of one layer: the matrix `left @ right`, or `dense` where there are no factors.

    Attributes:
        layout: of the layer's weight.
        left: (out, r), scaling included.
        right: (r, in).
        dense: (out, in).
        bias: (out,), or None when the bias does not change.
    """

    layout: Layout
    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None

    def matrix(self) -> Tensor:
        """(out, in), float64."""
        if self.left is not None and self.right is not None:
            return self.left @ self.right
        if self.dense is None:
            raise ValueError("a layer's change needs factors or a dense matrix")
        return self.dense

    def weight(self) -> Tensor:
        """The change in the shape of the layer's weight."""
        return self.layout.weight(self.matrix())


@dataclass(frozen=True)
class SavedDelta:
    """Change of a module that the adapter replaces as a whole (PEFT's modules_to_save).

    Attributes:
        base: float64 tensors of the base's module, by name inside it.
        change: the same names -> copy minus base.
        dtypes: in which each is written.
    """

    base: Mapping[str, Tensor]
    change: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]

    def copy(self) -> dict[str, Tensor]:
        """The replacement: base + change, in its dtype."""
        return {n: (b + self.change[n]).to(self.dtypes[n]).contiguous() for n, b in self.base.items()}


@dataclass(frozen=True)
class TokenDelta:
    """Change of single rows of an embedding (PEFT's trainable_token_indices).

    Attributes:
        rows: token id -> (base row, change of it), each (dim,) in float64.
        dtype: in which rows are written.
    """

    rows: Mapping[int, tuple[Tensor, Tensor]]
    dtype: torch.dtype

    def copy(self) -> Tensor:
        """(tokens, dim): the new rows in the order of `rows`."""
        return torch.stack([b + c for b, c in self.rows.values()]).to(self.dtype)


Delta = LayerDelta | SavedDelta | TokenDelta
