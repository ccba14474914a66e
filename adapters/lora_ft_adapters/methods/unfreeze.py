"""Training parts of the base itself, as adapters: copies that are trained, saved, switched and merged by name.

    head    the output head; with `mlp_dim` also up(gelu(down(x))) beside it, up at zero at the start
    layers  whole blocks: the `last` N, `layers_to_transform`, the last `stages`, or what `target_modules` names
    full    every parameter

Each adapter has a copy of every parameter of its modules, in float32 for a 16-bit base, which runs in the base's dtype
in place of the original; the base keeps every bit. A parameter with several places among these modules has one copy, so
ties stay tied. A head that is tied to an embedding outside of the adapter is untied: the embedding keeps the base's
weights. Buffers are copied and saved too. In `training_mode`, as in every run of lora-ft, batch norms keep the base's
running statistics and only their gains and biases train; after a plain `model.train()` they learn them, in the copy.

Several active adapters add up: W + sum of (W_i - W). Merging puts the copies into the base and is exact.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from lora_ft_adapters.blocks import transformer_blocks
from lora_ft_adapters.copies import Beside, Copy, CopyLayer
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.layer import AdapterLayer
from lora_ft_adapters.modules import (
    input_width,
    is_linear,
    join,
    linear_sizes,
    linears,
    lookup,
    output_width,
    unwrapped,
    walk,
)
from lora_ft_adapters.plugin import AdapterConfig, AdapterTuner, PluginType, chosen_blocks, plug_in
from lora_ft_adapters.registry import Method, register


@dataclass
class UnfreezeConfig(AdapterConfig):
    """Options of head, layers and full.

    Attributes:
        part: head, layers or full.
        last: with layers, how many blocks at the end of each stack; a convolutional network is one stack.
        stages: with layers, how many whole stages at the end of each stack (ResNet, ConvNeXt, Swin, SegFormer).
        mlp_dim: with head, hidden size of an MLP beside it; None for none.
    """

    peft_key: ClassVar[PluginType] = PluginType("LORA_FT_UNFREEZE")

    part: str = field(default="full")
    last: int | None = field(default=None)
    stages: int | None = field(default=None)
    mlp_dim: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            self.task_type = None  # PEFT's classes for these wrap the head once more, after it was copied
        if self.part not in ("head", "layers", "full"):
            raise ValueError(f"part {self.part!r} is none of head, layers, full")
        if any(n is not None and n < 1 for n in (self.last, self.stages, self.mlp_dim)):
            raise ValueError("last, stages and mlp_dim must be at least 1")
        ways = {"last": self.last, "stages": self.stages, "layers_to_transform": self.layers_to_transform,
                "target_modules": self.target_modules}  # fmt: skip
        given = [name for name, value in ways.items() if value]
        if len(given) > 1 and given != ["layers_to_transform", "target_modules"]:
            raise ValueError(f"give {given[0]} or {given[1]}, not both")
        if self.mlp_dim and self.part != "head":
            raise ValueError("mlp_dim goes with head")
        if self.part != "layers" and (self.last or self.stages or self.layers_to_transform):
            raise ValueError(f"last, stages and layers_to_transform go with layers, not with {self.part}")


class UnfreezeTuner(AdapterTuner):
    """Copies of the base's own parameters, trained in their place."""

    prefix = CopyLayer.prefix
    tuner_layer_cls = CopyLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self.owners: dict[int, tuple[CopyLayer, str]] = {}
        # PEFT adds classifier heads to modules_to_save on its own; what the adapter copies is not copied there too.
        saved, peft_config.modules_to_save = peft_config.modules_to_save, None
        super()._prepare_model(peft_config, model)
        if saved:
            parts = {part for name in peft_config.adapted_modules for part in (name, *name.split("."))}
            peft_config.modules_to_save = [m for m in saved if m not in parts] or None

    def find(self, config: UnfreezeConfig, model: nn.Module) -> list[str]:
        """Names of the modules of the part."""
        if config.part == "full":
            loose = [n for n, _ in unwrapped(model).named_parameters(recurse=False)]
            if loose:
                raise AdapterError(
                    f"parameter {loose[0]!r} belongs to the model itself, which PEFT cannot wrap",
                    "put the model into another module, or use layers with target_modules",
                )
            return [n for n, _ in model.named_children()]
        if config.part == "layers":
            return _last(config, model)
        return _heads(model)

    def expand(self, config: UnfreezeConfig, names: list[str], model: nn.Module) -> list[str]:
        """Every module in the named ones that has parameters or running statistics of its own.

        Raises:
            AdapterError: one of them is quantised.
        """
        found = {n: m for n, m in walk(model) if any(n == k or n.startswith(f"{k}.") for k in names) and _holds(m)}
        for name, module in found.items():
            whole = [p for _, p in module.named_parameters(recurse=False)]
            if any(not p.is_floating_point() or p.element_size() < 2 for p in whole) or "qweight" in module._buffers:
                raise AdapterError(f"{name} is quantised, so its weights cannot be trained", "load the base in bf16")
        return list(found)

    def build(self, config: UnfreezeConfig, layer: AdapterLayer, name: str, adapter_name: str) -> nn.Module:
        """Copies of the module's own parameters and buffers."""
        assert isinstance(layer, CopyLayer)
        base = layer.base_layer
        ties: dict[str, tuple[CopyLayer, str]] = {}
        for key, value in base.named_parameters(recurse=False):
            owner = self.owners.setdefault(id(value), (layer, key))
            if owner != (layer, key):
                ties[key] = owner
        copy = Copy(base, ties)
        if config.mlp_dim and config.adapted_modules and name == config.adapted_modules[-1]:
            if not is_linear(base):
                raise AdapterError(f"mlp_dim: the head {name} is no linear layer")
            sizes = input_width(name, base).features, output_width(name, base).features
            copy.add_module("beside", Beside(sizes[0], config.mlp_dim, sizes[1]))
        return copy


def _holds(module: nn.Module) -> bool:
    own = next(module.named_parameters(recurse=False), None)
    return own is not None or module._buffers.get("running_mean") is not None or "qweight" in module._buffers


def _last(config: UnfreezeConfig, model: nn.Module) -> list[str]:
    blocks = chosen_blocks(config, model)
    if config.layers_to_transform:
        return [b.name for b in blocks]
    if config.stages:
        found: dict[str, dict[str, None]] = {}
        for block in blocks:
            if block.stage:
                found.setdefault(block.stack, {})[block.stage] = None
        if not found:
            raise AdapterError("stages: the blocks of this model do not stand in stages", "last: how many blocks")
        return [name for stages in found.values() for name in list(stages)[-config.stages :]]
    # Two blocks: enough to change what the model says, a small part of what it knows.
    count = config.last or 2
    size = {b.stack: sum(1 for c in blocks if c.stack == b.stack) for b in blocks}
    return [b.name for b in blocks if b.index >= size[b.stack] - count]


def _heads(model: nn.Module) -> list[str]:
    """Names of the output heads: what the model says, else the last part, and parts beside it that put out answers.

    A part between the body and the last one that keeps the width (a pooler) is none; DETR's classifier beside its
    boxes, and CLIP's two projections, are.
    """
    said = getattr(model, "get_output_embeddings", lambda: None)()
    if said is not None:
        return [next(n for n, m in walk(model) if m is unwrapped(said))]
    try:
        blocks = [b.name for b in transformer_blocks(model)]
    except AdapterError:
        blocks = []
    last = _last_part(model, blocks)
    parts = [n for n, c in unwrapped(model).named_children() if _size(c)]
    bodies = [i for i, part in enumerate(parts) if any(b.startswith(f"{part}.") for b in blocks)]
    beside = parts[max(bodies) + 1 : -1] if bodies and last == parts[-1] else []
    return [*(n for n in beside if _answers(n, unwrapped(lookup(model, n)[1]))), last]


def _answers(name: str, module: nn.Module) -> bool:
    layers = linears(module)
    return bool(layers) and linear_sizes(layers[0][1])[0] != linear_sizes(layers[-1][1])[1]


def _last_part(model: nn.Module, blocks: list[str]) -> str:
    """The last part with parameters that is no body."""
    name, module, whole = "", unwrapped(model), _size(model)
    while True:
        last = [n for n, c in module.named_children() if _size(c)]
        if not name and not last:
            raise AdapterError("the model has no module with parameters")
        body = any(b.startswith(f"{name}.") for b in blocks) if blocks else 2 * _size(module) > whole
        if name and (not last or not body):
            return name
        name = join(name, last[-1])
        module = unwrapped(lookup(model, name)[1])


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in unwrapped(module).parameters())


plug_in(UnfreezeConfig.peft_key, UnfreezeConfig, UnfreezeTuner)

_DESCRIPTIONS = {
    "head": "Trains the output head only (linear probe), with mlp_dim an MLP beside it; the body stays frozen.",
    "layers": "Trains whole blocks, by default the last two; the rest stays frozen.",
    "full": "Trains every parameter, as a copy that is saved and merged like an adapter.",
}
for _part, _description in _DESCRIPTIONS.items():
    register(
        Method(
            name=_part,
            description=_description,
            config_class=UnfreezeConfig,
            fixed={"part": _part},
            targets=None,
            family="part of the base",
        )
    )
