"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A is frozen at its random start, only B trains.

The gradient of B is projected so that B A follows the gradient of full fine-tuning as closely as A allows,
g_B <- (1 / s^2) g_B (A A^T)^-1 with s the scaling, and then goes through the optimizer (PEFT's LoraFAOptimizer does the
same inside an AdamW of its own).
"""

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_ft_adapters.behaviour import Behaviour, Calibration, Driver, keep_frozen, register_behaviour
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.registry import Method, register

from .lora import DEFAULTS

RIDGE = 1e-8  # keeps A A^T invertible


class LoraFaConfig(LoraConfig):
    """LoraConfig whose A is frozen; on disk it is plain LoRA."""


class _Projection(Driver):
    """Projects the gradients of all B."""

    def __init__(self, model: PeftModel, name: str) -> None:
        self.pairs: list[tuple[nn.Parameter, torch.Tensor]] = []
        layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
        for layer in layers:
            if name in layer.lora_A:
                a = layer.lora_A[name].weight.detach().double()
                inverse = torch.linalg.pinv(a @ a.T + RIDGE * torch.eye(len(a), dtype=a.dtype, device=a.device))
                b = layer.lora_B[name].weight
                self.pairs.append((b, (inverse / layer.scaling[name] ** 2).to(b.dtype)))

    def before_step(self) -> None:
        """g_B <- g_B (A A^T)^-1 / s^2."""
        for b, inverse in self.pairs:
            if b.grad is not None:
                b.grad = b.grad @ inverse.to(b.grad.dtype)


class LoraFa(Behaviour):
    """Freezes A, and drives the projection."""

    def matches(self, config: PeftConfig) -> bool:
        """Its own config class; a saved adapter is plain LoRA."""
        return isinstance(config, LoraFaConfig)

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """Plain LoRA with A frozen."""
        adapted = super().add(model, config, adapter_name, data)
        layers: list[Any] = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
        for layer in layers:
            if adapter_name in layer.lora_A or layer.lora_embedding_A:
                if layer.lora_embedding_A or not all(isinstance(m, nn.Linear) for m in layer.lora_A.values()):
                    raise AdapterError("lorafa works on linear layers only", "name linear layers in target_modules")
                keep_frozen(layer, adapter_name, ("lora_A",))
        return adapted

    def driver(self, model: PeftModel, adapter_name: str) -> Driver:
        """The projection."""
        return _Projection(model, adapter_name)


register_behaviour(LoraFa())
register(
    Method(
        "lorafa",
        "LoRA with A frozen and the gradient of B projected (LoRA-FA, arXiv:2308.03303); half the optimizer state.",
        LoraFaConfig,
        defaults=DEFAULTS,
        family="LoRA",
    )
)
