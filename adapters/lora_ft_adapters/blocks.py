"""What a model is made of, read from its modules: no table of model names.

Names are those of the bare model: a module that an adapter wraps keeps its name, and so do the modules inside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Block:
    """One transformer block: `stack` is the list it stands in, `index` its place there."""

    name: str
    stack: str
    index: int
    module: nn.Module


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
        yield from walk(child, f"{name}.{child_name}" if name else child_name, seen)


def lookup(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """(bare parent, module as it stands there, adapted or not) of a name from `walk`."""
    *path, last = name.split(".")
    parent = unwrapped(model)
    for part in path:
        parent = unwrapped(parent.get_submodule(part))
    return parent, parent.get_submodule(last)


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


def _own_width(module: nn.Module) -> Width | None:
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
            return Width(value)
    weight = module._parameters.get("weight")
    return Width(weight.shape[0]) if weight is not None and weight.dim() == 1 else None


def output_width(name: str, module: nn.Module) -> Width:
    """The feature axis of what `module` returns, from itself or the last layer inside it.

    Raises:
        AdapterError: nothing inside tells its size.
    """
    for _, inner in reversed(list(walk(module))):
        found = _own_width(inner)
        if found:
            return found
    raise AdapterError(
        f"{name} ({type(module).__name__}) does not tell the size of its output", "name a layer with weights"
    )


def stream_width(model: nn.Module, name: str, module: nn.Module) -> Width:
    """`output_width`, but for an attention block and modules inside it the width of the block's residual stream.

    A mixture of experts ends with whatever its class defines last, which may be a gate with one output.
    """
    if _own_width(module) is None:
        for stack, elements in _attention_stacks(model, ""):
            for i, element in enumerate(elements):
                if f"{name}.".startswith(f"{stack}.{i}.") and linears(element):
                    return Width(linear_sizes(linears(element)[0][1])[0])
    return output_width(name, module)


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


def transformer_blocks(model: nn.Module) -> list[Block]:
    """The blocks of every stack of the model (encoder, decoder, vision tower), in order.

    A stack is a `ModuleList` whose elements hold attention; where no list does, the outermost list with the most
    elements of one class.

    Raises:
        AdapterError: there is no such list.
    """
    stacks = _attention_stacks(model, "")
    if not stacks:
        lists = [s for s in _lists(model, "") if len(s[1]) > 1 and len({type(unwrapped(e)) for e in s[1]}) == 1]
        stacks = [max(lists, key=lambda s: len(s[1]))] if lists else []
    if not stacks:
        raise AdapterError("no list of transformer blocks was found in this model", "give target_modules")
    return [
        Block(f"{name}.{i}", name, i, unwrapped(element))
        for name, elements in stacks
        for i, element in enumerate(elements)
    ]


def stacks(model: nn.Module) -> list[Block]:
    """The blocks of every stack, bare names: transformer blocks, or else the elements of the outermost sequences."""
    root: nn.Module = getattr(model, "get_base_model", lambda: model)()
    try:
        return transformer_blocks(root)
    except AdapterError:
        found = list(_sequences(unwrapped(root), ""))
        return [Block(f"{n}.{i}" if n else str(i), n, i, e) for n, es in found for i, e in enumerate(es)]


def _sequences(module: nn.Module, name: str) -> Iterator[tuple[str, Sequence[nn.Module]]]:
    if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
        yield name, list(module)
        return
    for child_name, child in module.named_children():
        yield from _sequences(unwrapped(child), f"{name}.{child_name}" if name else child_name)


def block_at(name: str, blocks: Sequence[Block]) -> Block | None:
    """The block that a module or parameter is in, by its bare name."""
    inside = [b for b in blocks if name == b.name or name.startswith(f"{b.name}.")]
    return max(inside, key=lambda b: len(b.name), default=None)


def _lists(module: nn.Module, name: str) -> Iterator[tuple[str, Sequence[nn.Module]]]:
    """Outermost lists of modules with parameters, by name."""
    module = unwrapped(module)
    if isinstance(module, nn.ModuleList) and len(module) and any(True for _ in module.parameters()):
        yield name, list(module)
        return
    for child_name, child in module.named_children():
        yield from _lists(child, f"{name}.{child_name}" if name else child_name)


def _attention_stacks(module: nn.Module, name: str) -> list[tuple[str, Sequence[nn.Module]]]:
    found: list[tuple[str, Sequence[nn.Module]]] = []
    for stack, elements in _lists(module, name):
        if any(has_attention(e) for e in elements):
            found += _innermost(stack, elements)
    return found


def _innermost(stack: str, elements: Sequence[nn.Module]) -> list[tuple[str, Sequence[nn.Module]]]:
    """Lists inside `elements` that are stacks themselves (Swin's stages, ALBERT's groups), or `elements`.

    T5 keeps attention and feed-forward of one block in a list too: not every element of that one has attention.
    """
    inner = [found for i, e in enumerate(elements) for found in _lists(e, f"{stack}.{i}")]
    inner = [(n, es) for n, es in inner if all(has_attention(e) for e in es)]
    if not inner:
        return [(stack, elements)]
    return [found for n, es in inner for found in _innermost(n, es)]


@dataclass(frozen=True)
class Places:
    """Where adapters go in one block; names are relative to the block.

    Attributes:
        attention: outputs of the attention modules.
        feed_forward: output of the feed-forward part, or None.
        reads: the module whose input is the input of the feed-forward part, or None.
        beside: the feed-forward module, where it is a module of its own, or None.
    """

    attention: tuple[str, ...]
    feed_forward: str | None
    reads: str | None
    beside: str | None


def places(block: Block) -> Places:
    """The linear layers (or, for mixtures of experts and torch's own attention, modules) that end each part."""
    layers = linears(block.module)
    multihead = [n for n, m in walk(block.module) if isinstance(m, nn.MultiheadAttention)]
    if not layers:
        return Places(tuple(multihead), None, None, None)
    # The first layer reads the residual stream, so its input has the width that outputs are told by.
    hidden = linear_sizes(layers[0][1])[0]
    ends: dict[str, str] = {}
    for name, layer in layers:
        if is_attention(name) and linear_sizes(layer)[1] == hidden:
            ends[_attention_root(name)] = name
    rest = [(n, m) for n, m in layers if not is_attention(n)]
    outputs = [n for n, m in rest if linear_sizes(m)[1] == hidden]
    inputs = [n for n, m in rest if linear_sizes(m)[0] == hidden]
    beside = _common_module(block.module, [n for n, _ in rest])
    if beside and _mixes_experts(block.module.get_submodule(beside)):
        return Places((*multihead, *ends.values()), beside, beside, beside)
    last, first = (outputs[-1] if outputs else None), (inputs[0] if inputs else None)
    return Places((*multihead, *ends.values()), last, first, beside)


def _attention_root(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[: next(i for i, p in enumerate(parts) if is_attention(p)) + 1])


def _common_module(block: nn.Module, names: Sequence[str]) -> str | None:
    """The innermost module that holds all of `names` and is neither the block nor one that also normalises."""
    if not names:
        return None
    shared = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")[:-1]
        same = next((i for i, (a, b) in enumerate(zip(shared, parts, strict=False)) if a != b), None)
        shared = shared[: min(len(shared), len(parts)) if same is None else same]
    inside = [type(m).__name__.lower() for _, m in walk(block.get_submodule(".".join(shared)))] if shared else []
    return None if not shared or any("norm" in kind for kind in inside) else ".".join(shared)


def _mixes_experts(module: nn.Module) -> bool:
    return any("expert" in name.lower() for name, _ in walk(module))
