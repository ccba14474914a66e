"""PEFT's merge of one layer on a copy, and whether it is what the adapter computes."""

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

# Some methods compute in float32 whatever they are given: 2^-24 = 6e-8, times the length of the sums.
ROUNDING_32 = 1e-5
MERGE_LIMIT = 1e-3  # share of the change by which a merge may differ from the adapter's own outputs


def merge_layer(layer: BaseTunerLayer, adapter: str, dtype: torch.dtype) -> Any:
    """A copy of the layer with the adapter merged into its base."""
    alone: Any = copy.deepcopy(layer)
    alone.to(dtype).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on merging; the outcome is checked
        alone.merge(safe_merge=True, adapter_names=[adapter])
    if adapter not in alone.merged_adapters:
        raise ValueError("PEFT's merge does nothing")
    return alone


def outputs_kept(layer: BaseTunerLayer, adapter: str, dtype: torch.dtype) -> bool:
    """Whether the merged layer gives the outputs of the layer with its adapter."""
    alone: Any = copy.deepcopy(layer)
    alone.to(dtype).eval()
    alone.set_adapter([adapter])
    base = alone.get_base_layer()
    inputs = _example(base)
    plain, adapted, merged = base(inputs), alone(inputs), merge_layer(layer, adapter, dtype)(inputs)
    limit = MERGE_LIMIT * float((adapted - plain).norm()) + ROUNDING_32 * float(adapted.norm())
    return float((merged - adapted).norm()) <= limit


def _example(layer: nn.Module) -> Tensor:
    """Seeded input for one layer, so that its merge can be compared with what its adapter computes."""
    generator = torch.Generator().manual_seed(0)
    weight: Any = layer.weight
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings, device=weight.device)[None]
    shape: tuple[int, ...] = (2, weight.shape[0] if type(layer).__name__ == "Conv1D" else weight.shape[-1])
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = (2, layer.in_channels, *(k + 3 for k in layer.kernel_size))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)
