"""LoRA on a quantised base, trained through the quantiser that its merge will use.

    QLoRA:        y = x Q(W)^T + s (x A^T) B^T           merged and quantised again, s B A is rounded away in part
    merge-aware:  y = x Q(M)^T,  M = W' + s B A          W' is what the quantised layer multiplies with now

The gradient passes Q as if it were not there (straight-through, arXiv:1308.3432): dx = dy Q(M), dA = s (dy B)^T x,
dB = s dy^T (x A^T). So the loss that is trained is that of the merged 4-bit or 8-bit model itself. Q comes from the
base's own layers, so it has their type, block size and second quantisation.
"""

from types import TracebackType
from typing import Any, Self

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError

FOUR_BIT, EIGHT_BIT = "Params4bit", "Int8Params"


def requantised(base: nn.Module, weight: Tensor) -> nn.Module:
    """A frozen layer that holds another weight in the same way; its `state_dict` is what a checkpoint holds.

    Args:
        base: a quantised linear layer of bitsandbytes.
        weight: (O, I), any float dtype, on the same device.

    Raises:
        AdapterError: the layer is not one of bitsandbytes.
    """
    held: Any = getattr(base, "weight", None)
    kind, make = type(held).__name__, type(base)
    made: Any
    if kind == FOUR_BIT:
        state = held.quant_state
        made = make(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=base.compute_dtype, device="meta",
            compress_statistics=state.nested, quant_type=state.quant_type, quant_storage=held.quant_storage,
        )  # fmt: skip
        made.support_avx512bf16_for_cpu = base.support_avx512bf16_for_cpu
        new = type(held)(
            weight.to(state.dtype), requires_grad=False, blocksize=state.blocksize, module=made,
            compress_statistics=state.nested, quant_type=state.quant_type, quant_storage=held.quant_storage,
        )  # fmt: skip
        made.weight = new._quantize(weight.device)
    elif kind == EIGHT_BIT:
        threshold = base.state.threshold  # type: ignore[union-attr]
        made = make(
            weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        made.weight = type(held)(weight, requires_grad=False, has_fp16_weights=False)._quantize(weight.device)
    else:
        raise AdapterError(f"a weight held as {kind} cannot be quantised again", "merge_aware: false")
    made.bias = base.bias
    return made.train(base.training)  # type: ignore[no-any-return]


def values(layer: nn.Module) -> Tensor:
    """What a quantised linear layer multiplies with, (O, I), in the dtype that dequantising gives."""
    held: Any = layer.weight
    if type(held).__name__ != EIGHT_BIT:
        found: Tensor = dequantize_module_weight(layer)
        return found.detach()
    # PEFT's way moves the weight, after which an 8-bit layer that ran before has lost its scales (bitsandbytes 0.50).
    from bitsandbytes import functional

    scales: Any = held.SCB if held.SCB is not None else layer.state.SCB  # type: ignore[union-attr]
    dense: Tensor = functional.int8_vectorwise_dequant(held.data, scales)
    return dense


class _ThroughQuantiser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: nn.Module, scaling: float) -> Tensor:
        """x (..., I), a (r, I), b (O, r), layer I -> O with Q(M); gives (..., O)."""
        y: Tensor = layer(x)
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.scaling = layer, scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        flat, a_, b_ = x.reshape(-1, x.shape[-1]).to(dy.dtype), a.to(dy.dtype), b.to(dy.dtype)
        da = ((dy @ b_).mul_(ctx.scaling).t() @ flat).to(a.dtype)
        db = (dy.t() @ (flat @ a_.t())).mul_(ctx.scaling).to(b.dtype)
        dx = (dy @ values(ctx.layer).to(dy.dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, da, db, None, None


class _Switched:
    """One LoRA layer, and its merged weight in the base's own format for as long as the adapter stays as it is."""

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name
        self.plain = layer.forward
        self._seen: tuple[Tensor, Tensor, float] | None = None
        self._held: nn.Module | None = None

    def merged(self) -> nn.Module:
        """The quantised layer of W' + s B A."""
        layer, name = self.layer, self.name
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        seen, scaling = self._seen, layer.scaling[name]
        # By value: writes through `.data`, and those of some optimizers, leave no trace in torch's version counter.
        if seen is None or seen[2] != scaling or not (torch.equal(seen[0], a) and torch.equal(seen[1], b)):
            self._held = requantised(layer.get_base_layer(), merged_weight(layer, name))
            self._seen = a.clone(), b.clone(), scaling
        assert self._held is not None
        return self._held

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        if layer.disable_adapters or layer.merged:
            result: Tensor = self.plain(x, *args, **kwargs)
            return result
        if args or kwargs or layer.active_adapters != [self.name]:
            raise AdapterError("merge_aware knows one active adapter", "merge_aware: false")
        a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
        out: Tensor = _ThroughQuantiser.apply(  # type: ignore[no-untyped-call]
            x, a, b, self.merged(), layer.scaling[self.name]
        )
        return out


@torch.no_grad()
def merged_weight(layer: Any, name: str = "default") -> Tensor:
    """W' + s B A of one LoRA layer, float32, before it is quantised."""
    delta: Tensor = layer.get_delta_weight(name)
    return values(layer.get_base_layer()).float() + delta.float()


class MergeAware:
    """LoRA layers on a quantised base compute with the merged weight as it will be stored.

    It also works as a context. Memory: a second copy of the adapted layers in the base's few bits.

    Args:
        model: with an adapter.
        name: of the adapter.

    Attributes:
        layers: that it reaches, by name.

    Raises:
        AdapterError: the method, or what its layers do, is not a sum with the weight; says why.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.name = name
        self.layers: dict[str, Any] = {
            path: m
            for path, m in model.named_modules()
            if isinstance(m, LoraLayer) and name in m.lora_A and _quantised(m.get_base_layer())
        }
        if not self.layers:
            raise AdapterError(
                "merge_aware needs LoRA on a base that bitsandbytes quantises; this adapter has no such layer",
                "method: lora with quant: nf4, fp4 or int8; or merge_aware: false",
            )
        for path, layer in self.layers.items():
            reason = _refusal(layer, name)
            if reason:
                raise AdapterError(f"merge_aware: {reason} (at {path})", "leave that out, or merge_aware: false")

    def install(self) -> None:
        """From now on, in training and evaluation alike."""
        for layer in self.layers.values():
            layer.forward = _Switched(layer, self.name).forward

    def remove(self) -> None:
        """Back to PEFT's own forward, base and adapter side by side."""
        for layer in self.layers.values():
            layer.__dict__.pop("forward", None)  # the class's own forward shows again

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def _quantised(base: nn.Module) -> bool:
    return type(getattr(base, "weight", None)).__name__ in (FOUR_BIT, EIGHT_BIT)


def _refusal(layer: Any, name: str) -> str:
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} does more than add to the weight"
    if layer.lora_bias.get(name, False) or layer.lora_B[name].bias is not None:
        return "lora_bias changes the bias, which is not quantised"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "lora_dropout has no meaning once adapter and weight are one"
    return ""
