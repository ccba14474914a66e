"""What one module is, read from itself: linear, convolution, attention, the size of its input and output.

Names are those of the bare model: a module that an adapter wraps keeps its name, and so do the modules inside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .errors import AdapterError

_CHANNEL_COUNTS = ("out_channels", "num_features", "num_channels")
_WIDTHS = ("out_features", "outfeatures", "nf", "embedding_dim", "embed_dim", "normalized_shape")


@dataclass(frozen=True)
class Width:
    """Size of the feature axis of a module's input or output; `dim` is -1, or the channel axis of a convolution."""

    features: int
    dim: int = -1


def join(name: str, child: str) -> str:
    """The dotted name of something inside a module; "" is the module itself, or the model."""
    return f"{name}.{child}" if name and child else name or child


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that adapters wrap, or the module itself."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_submodule("base_layer" if isinstance(module, BaseTunerLayer) else "original_module")
    return module


def walk(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` as if no adapter were there."""
    seen = set() if seen is None else seen
    module = unwrapped(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module.named_children():
        yield from walk(child, join(name, child_name), seen)


def lookup(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """(bare parent, module as it stands there, adapted or not) of a name from `walk`."""
    *path, last = name.split(".")
    parent = unwrapped(model)
    for part in path:
        parent = unwrapped(parent.get_submodule(part))
    return parent, parent.get_submodule(last)


def embedding_ends(model: nn.Module) -> list[nn.Module | None]:
    """The input embedding and the output head, as the model says; None where it has none."""
    ends: list[nn.Module | None] = []
    for side in ("input", "output"):
        try:
            ends.append(getattr(model, f"get_{side}_embeddings", lambda: None)())
        except NotImplementedError:  # Transformers' answer for models without tokens (ResNet, SegFormer, DETR)
            ends.append(None)
    return ends


def is_linear(module: nn.Module) -> bool:
    """A linear map over the last axis, quantised or not, of torch, Transformers (`Conv1D`) or another library."""
    if next(module.children(), None) is not None:
        return False
    sizes = [(getattr(module, a, None), getattr(module, b, None)) for a, b in (("in_features", "out_features"),
             ("infeatures", "outfeatures"), ("nx", "nf"))]  # fmt: skip
    return any(isinstance(i, int) and isinstance(o, int) for i, o in sizes)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear module."""
    for a, b in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        if isinstance(getattr(module, a, None), int):
            return int(getattr(module, a)), int(getattr(module, b))
    raise AdapterError(f"{type(module).__name__} is not a linear layer")


def own_width(module: nn.Module) -> Width | None:
    """The feature axis of what a layer puts out, or None for a module that does not say."""
    for attribute in _CHANNEL_COUNTS:
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            # A convolution's input may lack the batch axis, so count from the end; norms always have it.
            kernel = getattr(module, "kernel_size", None)
            return Width(value, -1 - len(kernel) if isinstance(kernel, tuple) else 1)
    for attribute in _WIDTHS:
        value = getattr(module, attribute, None)
        value = value[-1] if isinstance(value, tuple) and value else value
        if isinstance(value, int):
            first = getattr(module, "data_format", "") == "channels_first" or type(module).__name__ == "LayerNorm2d"
            return Width(value, 1 if first else -1)
    weight = module._parameters.get("weight")
    return Width(weight.shape[0]) if weight is not None and weight.dim() == 1 else None


def output_width(name: str, module: nn.Module) -> Width:
    """The feature axis of what `module` returns, from itself or the last layer inside it.

    Raises:
        AdapterError: nothing inside tells its size.
    """
    for _, inner in reversed(list(walk(module))):
        found = own_width(inner)
        if found:
            return found
    raise AdapterError(
        f"{name} ({type(module).__name__}) does not tell the size of its output", "name a layer with weights"
    )


def input_width(name: str, module: nn.Module) -> Width:
    """The feature axis of what `module` takes, from the first layer inside it.

    Raises:
        AdapterError: nothing inside tells its size.
    """
    for _, inner in walk(module):
        if is_linear(inner):
            return Width(linear_sizes(inner)[0])
        channels = getattr(inner, "in_channels", None)
        if isinstance(channels, int):
            return Width(channels, -1 - len(inner.kernel_size))  # type: ignore[arg-type]
    raise AdapterError(
        f"{name} ({type(module).__name__}) does not tell the size of its input", "name a linear or conv layer"
    )


def linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers inside, in the order of definition; those of `nn.MultiheadAttention` are never called."""
    hidden = [n for n, m in walk(module) if isinstance(m, nn.MultiheadAttention)]
    return [
        (n, m) for n, m in walk(module) if is_linear(m) and not any(n == h or n.startswith(f"{h}.") for h in hidden)
    ]


def is_attention(path: str) -> bool:
    """Whether a path inside a block belongs to an attention module."""
    return any("att" in part.lower() and "norm" not in part.lower() for part in path.split("."))


def has_attention(module: nn.Module) -> bool:
    """Whether a module holds attention: a linear layer of that name, or torch's own module."""
    return any(isinstance(m, nn.MultiheadAttention) or (is_linear(m) and is_attention(n)) for n, m in walk(module))


def conv_rank(module: nn.Module) -> int:
    """Number of axes that the first convolution inside `module` moves along; 0 where there is none."""
    convolutions = (m for _, m in walk(module) if isinstance(m, nn.modules.conv._ConvNd))
    return next((len(m.kernel_size) for m in convolutions), 0)


def weight_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers and convolutions inside."""
    return [(n, m) for n, m in walk(module) if is_linear(m) or isinstance(m, nn.modules.conv._ConvNd)]


def takes_lora(module: nn.Module) -> bool:
    """Whether PEFT's LoRA on this convolution computes what its merged weight would.

    PEFT copies kernel, stride and zero padding, but no dilation and no other padding, merges no groups, and calls the
    constructor of a class of somebody's own with arguments it may not take.
    """
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return False
    assert isinstance(module, nn.modules.conv._ConvNd)
    return module.groups == 1 and module.padding_mode == "zeros" and set(module.dilation) == {1}


def wrappers(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """(name in the bare model, module) of the outermost adapted layers and replaced modules."""
    inside, name, module = None, "", nn.Module()
    for name, module in model.get_base_model().named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = f"{name}."
            yield name, module
