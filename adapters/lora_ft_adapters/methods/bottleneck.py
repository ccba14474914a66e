"""Bottleneck adapters: y + s * up(f(down(x))), with up at zero at the start, so a fresh adapter is a no-op.

    houlsby   x = y, after attention and feed-forward output   (Houlsby et al. 2019, arXiv:1902.00751)
    pfeiffer  x = y, after feed-forward output                 (Pfeiffer et al. 2020, arXiv:2005.00247)
    parallel  x = the feed-forward part's input                (He et al. 2021, arXiv:2110.04366)

"Output" is the last linear layer of the part, before dropout, residual sum and norm. A residual block of a
convolutional network is one part and y its output (B, C, ...), so that houlsby and pfeiffer are the same there: down
and up are 1x1 convolutions over the channels. With `target_modules` they act on any module.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_ft_adapters.blocks import Places, is_convolutional, places, stream_width
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.layer import AdapterLayer, first_tensor
from lora_ft_adapters.modules import Width, input_width, join, lookup, unwrapped
from lora_ft_adapters.plugin import WRITTEN, AdapterConfig, AdapterTuner, PluginType, chosen_blocks, plug_in
from lora_ft_adapters.registry import Method, register

NON_LINEARITIES = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


@dataclass
class BottleneckConfig(AdapterConfig):
    """Options of the bottleneck adapters.

    Attributes:
        placement: houlsby, pfeiffer or parallel.
        r: width of the bottleneck.
        reduction_factor: width of the layer over width of the bottleneck; instead of `r` when given.
        non_linearity: relu, gelu, silu or tanh.
        scaling: factor of what is added; None for 4.0 with parallel, else 1.0.
        dropout: probability, on the input of `down`, in training.
        reads: by adapted module, the module whose input a parallel adapter reads; written, not chosen.
    """

    peft_key: ClassVar[PluginType] = PluginType("LORA_FT_BOTTLENECK")

    placement: str = field(default="houlsby")
    r: int = field(default=64)
    reduction_factor: float | None = field(default=None)
    non_linearity: str = field(default="relu")
    scaling: float | None = field(default=None)
    dropout: float = field(default=0.0)
    reads: dict[str, str] | None = field(default=None, metadata={WRITTEN: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement {self.placement!r} is none of {', '.join(PLACEMENTS)}")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"non_linearity {self.non_linearity!r} is none of {', '.join(NON_LINEARITIES)}")
        if self.r < 1 or (self.reduction_factor is not None and self.reduction_factor <= 0):
            raise ValueError("r must be at least 1, and reduction_factor above 0")
        if self.scaling is None:
            # 4 is what He et al. found best for the parallel form (their section 4.6).
            self.scaling = 4.0 if self.placement == "parallel" else 1.0

    def width(self, features: int) -> int:
        """Size of the bottleneck on a layer with `features` outputs."""
        return max(1, int(features // self.reduction_factor)) if self.reduction_factor else self.r


class Bottleneck(nn.Module):
    """s * up(f(down(x))) over one axis; x is y itself, or the module's input when `parallel`."""

    def __init__(self, config: BottleneckConfig, source: Width, output: Width, own_input: bool) -> None:
        super().__init__()
        inner = config.width(output.features)
        self.down = nn.Linear(source.features, inner)
        self.up = nn.Linear(inner, output.features)
        # Houlsby et al. start near the identity (std 1e-2); exactly zero keeps the base's answers at step 0.
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.act = NON_LINEARITIES[config.non_linearity]()
        self.dropout = nn.Dropout(config.dropout)
        self.scaling = float(config.scaling or 0.0)
        self.source, self.output, self.own_input = source, output, own_input

    def forward(self, y: Tensor, x: Any) -> Tensor:
        """y (..., F) or (B, C, ...); x the input, (..., I); gives what to add to y."""
        if self.own_input:
            x = first_tensor(x).to(y.dtype).movedim(self.source.dim, -1)
        else:
            x = y.movedim(self.output.dim, -1)
        if x.shape[-1] != self.source.features:
            raise AdapterError(f"the adapter reads {self.source.features} features and the module gives {x.shape[-1]}")
        change: Tensor = self.scaling * self.up(self.act(self.down(self.dropout(x))))
        change = change.movedim(-1, self.output.dim)
        if change.shape != y.shape:
            raise AdapterError(f"the adapter's output {tuple(change.shape)} does not fit the module's {tuple(y.shape)}")
        return change


class BottleneckLayer(AdapterLayer):
    """A module with bottleneck adapters after or beside it."""

    prefix = "lft_bottleneck_"
    cannot_merge = "a bottleneck is not linear, so no weight of the base can hold it"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.handles: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}

    def listen(self, name: str, module: nn.Module) -> None:
        """Let adapter `name` read the input of `module`, which runs before this layer in the same forward."""
        self.handles[name] = module.register_forward_pre_hook(_Ear(self, name), with_kwargs=True)

    def adapt(self, names: Any, y: Tensor, source: Any) -> Tensor:
        """As the base class, with the input that each adapter reads."""
        for name in names:
            if name in self.handles and name not in self.seen:
                raise AdapterError("a parallel adapter's layer ran before the layer whose input it reads")
            y = super().adapt([name], y, self.seen.pop(name, source))
        return y

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the hook goes too."""
        self.silence(adapter_name)
        super().delete_adapter(adapter_name)

    def silence(self, name: str) -> None:
        """Take away the hook of one adapter."""
        self.seen.pop(name, None)
        if name in self.handles:
            self.handles.pop(name).remove()


class _Ear:
    """A forward pre-hook; an object, so that a deep copy of the model hears the copy's layers."""

    def __init__(self, layer: BottleneckLayer, name: str) -> None:
        self.layer, self.name = layer, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.name in self.layer.running():
            self.layer.seen[self.name] = args[0] if args else next(iter(kwargs.values()))


class BottleneckTuner(AdapterTuner):
    """Bottleneck adapters after attention and feed-forward or residual blocks, or beside the feed-forward part."""

    prefix = BottleneckLayer.prefix
    tuner_layer_cls = BottleneckLayer

    def find(self, config: BottleneckConfig, model: nn.Module) -> list[str]:
        """The ends of each block's parts, as the placement says."""
        names: list[str] = []
        reads: dict[str, str] = {}
        for block in chosen_blocks(config, model):
            there = places(block)
            if there.feed_forward is None:
                raise AdapterError(f"no feed-forward part was found in {block.name}", "give target_modules")
            if config.placement == "parallel" and is_convolutional(block):
                raise AdapterError(f"{block.name} is convolutional, and parallel has no place beside it", "houlsby")
            names += [join(block.name, n) for n in _where(config.placement, there)]
            if config.placement == "parallel" and not there.beside and there.feed_forward and there.reads:
                reads[f"{block.name}.{there.feed_forward}"] = f"{block.name}.{there.reads}"
        if not names:
            raise AdapterError(f"the blocks of this model have no place for {config.placement}", "give target_modules")
        config.reads = reads or None
        return names

    def build(self, config: BottleneckConfig, layer: AdapterLayer, name: str, adapter_name: str) -> nn.Module:
        """A bottleneck of the size of the module's output."""
        output = stream_width(self.model, name, layer.base_layer)
        if config.placement != "parallel":
            return Bottleneck(config, output, output, own_input=False)
        heard = (config.reads or {}).get(name)
        if heard is None:
            return Bottleneck(config, input_width(name, layer.base_layer), output, own_input=True)
        module = unwrapped(lookup(self.model, heard)[1])
        assert isinstance(layer, BottleneckLayer)
        layer.listen(adapter_name, module)
        return Bottleneck(config, input_width(heard, module), output, own_input=True)

    def release(self, layer: AdapterLayer) -> None:
        """Take the hooks away."""
        assert isinstance(layer, BottleneckLayer)
        for name in list(layer.handles):
            layer.silence(name)


def _where(placement: str, there: Places) -> list[str]:
    feed_forward = [there.feed_forward] if there.feed_forward is not None else []
    if placement == "houlsby":
        return [*there.attention, *feed_forward]
    return [there.beside] if placement == "parallel" and there.beside else feed_forward


plug_in(BottleneckConfig.peft_key, BottleneckConfig, BottleneckTuner)

_DESCRIPTIONS = {
    "houlsby": "Bottleneck adapters after attention and feed-forward output (Houlsby et al. 2019).",
    "pfeiffer": "Bottleneck adapters after feed-forward output only (Pfeiffer et al. 2020).",
    "parallel": "Scaled bottleneck adapters beside the feed-forward part (He et al. 2021).",
}
for _placement, _description in _DESCRIPTIONS.items():
    register(
        Method(
            name=_placement,
            description=_description,
            config_class=BottleneckConfig,
            fixed={"placement": _placement},
            targets=None,
            family="bottleneck",
        )
    )
