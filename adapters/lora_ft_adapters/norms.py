"""How large the change is that an adapter makes to each weight, without making it."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .modules import wrappers

CANNOT = (NotImplementedError, AttributeError, RuntimeError, ValueError, TypeError, KeyError)


@torch.no_grad()
def update_norms(model: PeftModel, adapter: str = "default") -> dict[str, tuple[float, float | None]]:
    """Frobenius norm of each module's change, alone and relative to its weight; None where the weight is not known.

    Modules whose change is no matrix (bottlenecks, prompts) are left out.
    """
    return {name: found for name, module in wrappers(model) for found in _norms(module, adapter)}


def _norms(module: nn.Module, adapter: str) -> Iterator[tuple[float, float | None]]:
    if isinstance(module, ModulesToSaveWrapper):
        if adapter in module.modules_to_save:
            old = dict(module.original_module.named_parameters())
            new = dict(module.modules_to_save[adapter].named_parameters())
            change = sum(float((new[n].float() - old[n].float()).square().sum()) for n in new if n in old) ** 0.5
            size = sum(float(p.float().square().sum()) for p in old.values()) ** 0.5
            yield change, change / size if size else None
        return
    if not isinstance(module, BaseTunerLayer):
        return
    try:
        change = _lora_norm(module, adapter) if isinstance(module, LoraLayer) else _delta_norm(module, adapter)
    except CANNOT:
        return
    yield change, _relative(change, module)


def _lora_norm(layer: Any, adapter: str) -> float:
    """Of B A through two r x r products."""
    if adapter not in layer.lora_A or layer.use_dora.get(adapter) or getattr(layer, "lora_variant", {}).get(adapter):
        return _delta_norm(layer, adapter)
    a, b = (m[adapter].weight.detach().float().flatten(1) for m in (layer.lora_A, layer.lora_B))
    return abs(float(layer.scaling[adapter])) * math.sqrt(max(float(((a @ a.T) * (b.T @ b)).sum()), 0.0))


def _delta_norm(layer: Any, adapter: str) -> float:
    delta: Tensor = layer.get_delta_weight(adapter)
    return float(delta.float().norm())


def _relative(change: float, layer: Any) -> float | None:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None or not weight.is_floating_point():  # unpacking 8-bit weights changes the layer's state
        return None
    whole = weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight  # torchao's has no norm
    size = float(whole.detach().float().norm())
    return change / size if size else None
