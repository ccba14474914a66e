"""LoRA layers of PEFT with a lean autograd: the same function, fewer products, casts and saved tensors.

    y = x W^T + b + s (x A^T) B^T        dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)

Eager PEFT builds this from six autograd nodes and keeps their intermediates; here it is one node that keeps x and
x A^T, and the sums are done inside the products (addmm). A layer that does anything else at that moment (dropout, DoRA,
several active adapters, merged or disabled) runs PEFT's own forward.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError


class _LeanLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scaling: float) -> Tensor:
        """x (..., I), a (r, I), b (O, r), base I -> O, frozen; gives (..., O)."""
        flat = x.reshape(-1, x.shape[-1])
        # In 16 bits the adapter's products run in 16 bits like the base's; its weights stay float32.
        a_, b_ = a.to(x.dtype), b.to(x.dtype)
        xa = flat @ a_.t()
        y = nn.functional.linear(flat, base.weight, base.bias).addmm_(xa, b_.t(), alpha=scaling)
        ctx.save_for_backward(flat, a, b, xa, base.weight)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, b, xa, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        a_, b_ = a.to(dy.dtype), b.to(dy.dtype)
        dxa = (dy @ b_).mul_(ctx.scaling)
        da = (dxa.t() @ flat).to(a.dtype)
        db = (dy.t() @ xa).mul_(ctx.scaling).to(b.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.addmm(dy @ weight, dxa, a_).view(ctx.shape)
        return dx, da, db, None, None


def _lean_forward(layer: LoraLinear, name: str) -> Any:
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dropout = layer.lora_dropout[name]
        busy = layer.disable_adapters or layer.merged or args or kwargs or layer.active_adapters != [name]
        if busy or (layer.training and not isinstance(dropout, nn.Identity)):
            result: Tensor = plain(x, *args, **kwargs)
            return result
        base = layer.get_base_layer()
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        out: Tensor = _LeanLora.apply(x, a, b, base, layer.scaling[name])  # type: ignore[no-untyped-call]
        return out

    return forward


def lean_layers(model: nn.Module, name: str = "default") -> list[LoraLinear]:
    """The LoRA layers of adapter `name` that are plain: on a frozen dense linear layer, without a variant or bias."""
    return [
        m
        for m in model.modules()
        if type(m) is LoraLinear
        and type(m.get_base_layer()) is nn.Linear
        and name in m.lora_A
        and name not in m.lora_variant
        and not m.lora_bias.get(name, False)
        and m.lora_B[name].bias is None
        and not m.get_base_layer().weight.requires_grad
        and not (m.get_base_layer().bias is not None and m.get_base_layer().bias.requires_grad)
    ]


class Lean:
    """A context in which the plain LoRA layers of `model` run with the lean autograd. It can be entered many times.

    Args:
        model: with an adapter.
        name: of the adapter.

    Raises:
        AdapterError: it has no plain LoRA layer.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.layers = {m: _lean_forward(m, name) for m in lean_layers(model, name)}
        if not self.layers:
            raise AdapterError("the adapter has no plain LoRA layer")

    def __enter__(self) -> None:
        for layer, forward in self.layers.items():
            layer.forward = forward  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward  # the class's own forward shows again
