"""Compacter (Karimi Mahabadi et al. 2021, arXiv:2106.04647): Houlsby's adapters from parameterised Kronecker products.

    y + up(f(down(y)))     with the weight of down and up   W = sum_i kron(A_i, s_i t_i),   i = 1..n = phm_dim

A_i (n, n) is the rule, by default one for all layers of an adapter; s_i (in/n, phm_rank) and t_i (phm_rank, out/n) are
each layer's own. t and the bias of up start at zero, so a fresh adapter is a no-op.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_ft_adapters.blocks import places, stream_width
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.layer import AdapterLayer
from lora_ft_adapters.modules import Width, join
from lora_ft_adapters.plugin import AdapterConfig, AdapterTuner, PluginType, chosen_blocks, plug_in
from lora_ft_adapters.registry import Method, register

from .bottleneck import NON_LINEARITIES


@dataclass
class CompacterConfig(AdapterConfig):
    """Options of Compacter; the defaults are the paper's.

    Attributes:
        r: width of the bottleneck, a multiple of `phm_dim`; None for `reduction_factor`.
        reduction_factor: width of the layer over width of the bottleneck.
        phm_dim: n, the number of Kronecker products and the size of the rule.
        phm_rank: rank of each layer's own factors.
        shared_phm_rule: one rule for all layers, held by the first; false gives each layer its own.
        non_linearity: relu, gelu, silu or tanh.
        dropout: probability, on the input of `down`, in training.
    """

    peft_key: ClassVar[PluginType] = PluginType("LORA_FT_COMPACTER")

    r: int | None = field(default=None)
    reduction_factor: float = field(default=32.0)
    phm_dim: int = field(default=4)
    phm_rank: int = field(default=1)
    shared_phm_rule: bool = field(default=True)
    non_linearity: str = field(default="gelu")
    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phm_dim < 1 or self.phm_rank < 1 or self.reduction_factor <= 0:
            raise ValueError("phm_dim and phm_rank must be at least 1, and reduction_factor above 0")
        if self.r is not None and (self.r < 1 or self.r % self.phm_dim):
            raise ValueError(f"r {self.r} is not a multiple of phm_dim {self.phm_dim}")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"non_linearity {self.non_linearity!r} is none of {', '.join(NON_LINEARITIES)}")

    def width(self, features: int) -> int:
        """Size of the bottleneck: a multiple of `phm_dim`, at least that."""
        if self.r is not None:
            return self.r
        return max(1, round(features / self.reduction_factor / self.phm_dim)) * self.phm_dim


class Phm(nn.Module):
    """x W + bias with W (in, out) = sum_i kron(A_i, s_i t_i)."""

    def __init__(self, in_features: int, out_features: int, n: int, rank: int) -> None:
        super().__init__()
        # W's entries are sums of n * rank products A s t; with A and t as below x W keeps the variance of x.
        self.s = nn.Parameter(torch.randn(n, in_features // n, rank) * (in_features * rank) ** -0.5)
        self.t = nn.Parameter(torch.randn(n, rank, out_features // n))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """x (..., in), rule (n, n, n); gives (..., out)."""
        weight = torch.einsum("iab,ipr,irq->apbq", rule, self.s, self.t)
        return x @ weight.reshape(x.shape[-1], -1) + self.bias


class Compacter(nn.Module):
    """up(f(down(y))) with PHM layers; `holder` is the adapter that has the rule, or None for this one."""

    def __init__(self, config: CompacterConfig, width: Width, holder: "Compacter | None") -> None:
        super().__init__()
        n, inner = config.phm_dim, config.width(width.features)
        self.down = Phm(width.features, inner, n, config.phm_rank)
        self.up = Phm(inner, width.features, n, config.phm_rank)
        nn.init.zeros_(self.up.t)
        # Not a submodule: the rule is saved, counted and trained once, where it is held.
        self._holder = (holder,)
        if holder is None:
            self.rule = nn.Parameter(torch.randn(n, n, n) * n**-0.5)
        self.act = NON_LINEARITIES[config.non_linearity]()
        self.dropout = nn.Dropout(config.dropout)
        self.dim = width.dim

    def forward(self, y: Tensor, _: Any) -> Tensor:
        """y (..., F) or (B, C, ...); gives what to add to it."""
        rule = (self._holder[0] or self).rule.to(y.device)
        x = self.dropout(y.movedim(self.dim, -1))
        change: Tensor = self.up(self.act(self.down(x, rule)), rule)
        return change.movedim(-1, self.dim)


class CompacterLayer(AdapterLayer):
    """A module with Compacter adapters after it."""

    prefix = "lft_compacter_"
    cannot_merge = "a bottleneck is not linear, so no weight of the base can hold it"


class CompacterTuner(AdapterTuner):
    """Compacter adapters after attention and feed-forward."""

    prefix = CompacterLayer.prefix
    tuner_layer_cls = CompacterLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self.holder: list[Compacter] = []
        super()._prepare_model(peft_config, model)

    def find(self, config: CompacterConfig, model: nn.Module) -> list[str]:
        """The ends of the attention and feed-forward parts of each block, or its own end where it is convolutional."""
        found = [(b.name, places(b)) for b in chosen_blocks(config, model)]
        bare = [b for b, p in found if p.feed_forward is None]
        if bare:
            raise AdapterError(f"no feed-forward part was found in {bare[0]}", "give target_modules")
        names = [join(b, n) for b, p in found for n in (*p.attention, p.feed_forward) if n is not None]
        if not names:
            raise AdapterError("no attention or feed-forward output was found in this model", "give target_modules")
        return names

    def build(self, config: CompacterConfig, layer: AdapterLayer, name: str, adapter_name: str) -> nn.Module:
        """A pair of PHM layers; the first adapter built holds the rule for the others."""
        width = stream_width(self.model, name, layer.base_layer)
        if width.features % config.phm_dim:
            raise AdapterError(f"phm_dim {config.phm_dim} does not divide the {width.features} outputs of {name}")
        adapter = Compacter(config, width, self.holder[0] if self.holder else None)
        if config.shared_phm_rule and not self.holder:
            self.holder.append(adapter)
        return adapter


plug_in(CompacterConfig.peft_key, CompacterConfig, CompacterTuner)

COMPACTER = register(
    Method(
        name="compacter",
        description="Bottleneck adapters from shared Kronecker products, with few parameters (Mahabadi et al. 2021).",
        config_class=CompacterConfig,
        targets=None,
        family="bottleneck",
    )
)
