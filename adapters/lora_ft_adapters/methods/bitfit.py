"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): only biases train, as y = layer(x) + d with d = 0 at the start.

The same mathematics as training the bias b itself (b + d), for layers whose bias is the last thing they add.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lora_ft_adapters.blocks import unused_blocks
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.layer import AdapterLayer
from lora_ft_adapters.modules import Width, is_linear, output_width, walk
from lora_ft_adapters.plugin import AdapterConfig, AdapterTuner, PluginType, plug_in
from lora_ft_adapters.registry import Method, register


@dataclass
class BitfitConfig(AdapterConfig):
    """Options of BitFit.

    Attributes:
        add_bias: also give a bias to linear layers that have none; such an adapter cannot be merged.
    """

    peft_key: ClassVar[PluginType] = PluginType("LORA_FT_BITFIT")

    add_bias: bool = field(default=False)


class Bias(nn.Module):
    """One number per feature, zero at the start."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width.features))
        self.dim = width.dim

    def forward(self, y: Tensor, _: Any) -> Tensor:
        """What to add to y, as a view that broadcasts over every axis but the features'."""
        shape = [1] * y.dim()
        shape[self.dim] = -1
        return self.delta.view(shape)


class BitfitLayer(AdapterLayer):
    """A layer with a trained addition to its bias."""

    prefix = "lft_bitfit_"
    cannot_merge = "add_bias gave biases to layers that have none, and the base has no place for them"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.original: Tensor | None = None

    def merge_refusal(self) -> str | None:
        """Only a missing bias is in the way."""
        return self.cannot_merge if self.base_layer._parameters.get("bias") is None and len(self.adapters) else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the trained numbers to the bias, in place: a bias that two modules share stays shared."""
        bias = self.base_layer._parameters.get("bias")
        if bias is None:
            return super().merge()
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]
        total: Any = sum(self.adapters[n].get_parameter("delta") for n in names)
        if not names:
            return None
        if safe_merge and not bool(torch.isfinite(total).all()):
            raise ValueError(f"the biases of {', '.join(names)} are not finite")
        self.original = bias.detach().clone() if self.original is None else self.original
        with torch.no_grad():
            bias.copy_((bias.to(total.dtype) + total).to(bias.dtype))
        self.merged_adapters.extend(names)
        return None

    def unmerge(self) -> None:
        """Put the base's own bias back, bit for bit."""
        if self.original is not None:
            with torch.no_grad():
                self.base_layer.get_parameter("bias").copy_(self.original)
        self.original = None
        self.merged_adapters.clear()


class BitfitTuner(AdapterTuner):
    """Trained additions to the biases of the base."""

    prefix = BitfitLayer.prefix
    tuner_layer_cls = BitfitLayer

    def find(self, config: BitfitConfig, model: nn.Module) -> list[str]:
        """Every layer that ends with adding a bias; with `add_bias` also linear layers without one."""
        # torch's attention reads the weights of its output layer and never calls it.
        uncalled = [n for n, m in walk(model) if isinstance(m, nn.MultiheadAttention)]
        uncalled += [b.name for b in unused_blocks(model)]
        named = [(n, m) for n, m in walk(model) if n and not any(n.startswith(f"{u}.") for u in uncalled)]
        names = [n for n, m in named if adds_bias(m) or (config.add_bias and is_linear(m))]
        if not names:
            raise AdapterError("no layer of this model has a bias", "add_bias: true gives one to each linear layer")
        return names

    def build(self, config: BitfitConfig, layer: AdapterLayer, name: str, adapter_name: str) -> nn.Module:
        """Zeros of the size of the layer's output."""
        if not config.add_bias and not adds_bias(layer.base_layer):
            raise AdapterError(f"{name} has no bias to train", "add_bias: true, or leave it out of target_modules")
        return Bias(output_width(name, layer.base_layer))


def adds_bias(module: nn.Module) -> bool:
    """Whether the module has a bias and adds it last: linear and conv layers, and norms."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    known = is_linear(module) or isinstance(module, kinds) or "norm" in type(module).__name__.lower()
    bias = module._parameters.get("bias")
    return known and bias is not None and bias.dim() == 1


plug_in(BitfitConfig.peft_key, BitfitConfig, BitfitTuner)

BITFIT = register(
    Method(
        name="bitfit",
        description="Trains biases only, those that the base has or, with add_bias, new ones (Ben Zaken et al. 2021).",
        config_class=BitfitConfig,
        targets=None,
        family="part of the base",
    )
)
