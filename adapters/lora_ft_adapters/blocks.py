"""What a model is made of, read from its modules: no table of model names.

Names are those of the bare model, see `modules`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from .errors import AdapterError
from .modules import (
    Width,
    conv_rank,
    has_attention,
    is_attention,
    join,
    linear_sizes,
    linears,
    output_width,
    own_width,
    unwrapped,
    walk,
    weight_layers,
)


@dataclass(frozen=True)
class Block:
    """One block of a transformer or of a convolutional network.

    Attributes:
        name: of the module.
        stack: what it is counted in: an encoder, a decoder, a vision tower, the whole of a convolutional network.
        index: its number in the stack, through all stages.
        module: the block itself, bare.
        stage: name of the stage it is in, "" in a stack without stages.
    """

    name: str
    stack: str
    index: int
    module: nn.Module
    stage: str = ""


# Name of a stack, and (name, module, stage) of each of its blocks.
_Stack = tuple[str, list[tuple[str, nn.Module, str]]]
# Elements of a list with their names in it, which are numbers unless somebody chose others.
_Elements = Sequence[tuple[str, nn.Module]]


def stream_width(model: nn.Module, name: str, module: nn.Module) -> Width:
    """`output_width`, but inside attention blocks and after convolutional ones the width of the residual stream.

    A mixture of experts ends with whatever its class defines last, which may be a gate with one output. ConvNeXt's
    blocks end with a linear layer over the last axis, and give (B, C, H, W) all the same.
    """
    if own_width(module) is None:
        for block in _counted(_attention_stacks(model)):
            if f"{name}.".startswith(f"{block.name}.") and linears(block.module):
                return Width(linear_sizes(linears(block.module)[0][1])[0])
        rank = conv_rank(module)
        if rank and not has_attention(module):
            return Width(output_width(name, module).features, -1 - rank)
    return output_width(name, module)


def transformer_blocks(model: nn.Module) -> list[Block]:
    """The blocks of every stack of the model (encoder, decoder, vision tower), in order.

    A stack is a list whose elements hold attention. Where none does, the residual blocks of a convolutional network
    are one stack; where there are no convolutions either, the outermost list with the most elements of one class is.
    Stages that stand in a list (Swin, SegFormer, ResNet) are parts of one stack. Unused blocks are left out.

    Raises:
        AdapterError: there is no such list.
    """
    found = _attention_stacks(model) or _conv_stack(model)
    if not found:
        lists = [s for s in _lists(model, "") if len(s[1]) > 1 and len({type(unwrapped(e)) for _, e in s[1]}) == 1]
        found = [_flat(*max(lists, key=lambda s: len(s[1])))] if lists else []
    if not found:
        raise AdapterError(
            "no list of transformer blocks, or of residual ones, was found in this model", "give target_modules"
        )
    idle = {b.name for b in unused_blocks(model)}
    return [b for b in _counted(found) if b.name not in idle]


def unused_blocks(model: nn.Module) -> list[Block]:
    """Blocks of a vision tower behind the one whose output the model reads (LLaVA's `vision_feature_layer`)."""
    root: nn.Module = getattr(model, "get_base_model", lambda: model)()
    read = getattr(getattr(root, "config", None), "vision_feature_layer", None)
    if not isinstance(read, int | list | tuple):
        return []
    tower = [b for b in _counted(_attention_stacks(root)) if "vision" in b.stack]
    # Hidden state 0 is what goes into block 0, so there is one more of them than of blocks.
    used = max(n if n >= 0 else len(tower) + 1 + n for n in ([read] if isinstance(read, int) else read))
    return [b for b in tower if b.index >= used]


def stacks(model: nn.Module) -> list[Block]:
    """The blocks of every stack, bare names, or else the elements of the outermost sequences."""
    root: nn.Module = getattr(model, "get_base_model", lambda: model)()
    try:
        return transformer_blocks(root)
    except AdapterError:
        return _counted([_flat(n, es) for n, es in _sequences(unwrapped(root), "")])


def is_convolutional(block: Block) -> bool:
    """Whether a block puts out channels in front of pixels or time steps."""
    return bool(conv_rank(block.module)) and not has_attention(block.module)


def block_at(name: str, blocks: Sequence[Block]) -> Block | None:
    """The block that a module or parameter is in, by its bare name."""
    inside = [b for b in blocks if name == b.name or name.startswith(f"{b.name}.")]
    return max(inside, key=lambda b: len(b.name), default=None)


def _counted(found: Sequence[_Stack]) -> list[Block]:
    """Blocks with their numbers; stages are kept where a stack has several."""
    blocks = [Block(n, stack, i, unwrapped(m), s) for stack, es in found for i, (n, m, s) in enumerate(es)]
    staged = {stack for stack, es in found if len({s for *_, s in es}) > 1}
    return [b if b.stack in staged else replace(b, stage="") for b in blocks]


def _elements(module: nn.Module) -> _Elements:
    return [(n, m) for n, m in module._modules.items() if m is not None]


def _flat(name: str, elements: _Elements) -> _Stack:
    return name, [(join(name, n), e, name) for n, e in elements]


def _sequences(module: nn.Module, name: str) -> Iterator[tuple[str, _Elements]]:
    """Outermost lists and sequences of several modules, by name."""
    module = unwrapped(module)
    if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
        yield name, _elements(module)
        return
    for child_name, child in module.named_children():
        yield from _sequences(child, join(name, child_name))


def _lists(module: nn.Module, name: str) -> Iterator[tuple[str, _Elements]]:
    """Outermost lists of modules with parameters, by name; a sequence only where all of it is attention blocks."""
    module = unwrapped(module)
    if isinstance(module, nn.Sequential | nn.ModuleList) and any(True for _ in module.parameters()):
        whole = [e for e in module if any(True for _ in e.parameters())]
        if isinstance(module, nn.ModuleList) or all(has_attention(e) for e in whole):
            yield name, _elements(module)
            return
    for child_name, child in module.named_children():
        yield from _lists(child, join(name, child_name))


def _attention_stacks(model: nn.Module) -> list[_Stack]:
    lists = [(n, es) for n, es in _lists(model, "") if any(has_attention(e) for _, e in es)]
    return [(n, _innermost(n, es)) for n, es in lists]


def _innermost(name: str, elements: _Elements) -> list[tuple[str, nn.Module, str]]:
    """The blocks of a list: of lists inside its elements (Swin's stages, ALBERT's groups), or the elements.

    T5 keeps attention and feed-forward of one block in a list too: not every element of that one has attention.
    """
    inner = [(join(name, own), n, es) for own, e in elements for n, es in _lists(e, join(name, own))]
    inner = [(stage, n, es) for stage, n, es in inner if all(has_attention(e) for _, e in es)]
    if not inner:
        return _flat(name, elements)[1]
    return [(block, module, stage) for stage, n, es in inner for block, module, _ in _innermost(n, es)]


def _conv_stack(model: nn.Module) -> list[_Stack]:
    """The residual blocks of a convolutional network in order, else its convolutions that stand in sequences."""
    for least in (2, 1):
        lists = list(_conv_lists(model, "", least))
        blocks = [b for n, es in lists for b in _conv_blocks(n, es, least)]
        if len(blocks) > 1:
            return [(_shared([n for n, _ in lists]), blocks)]
    return []


def _shared(names: Sequence[str]) -> str:
    """The name of the innermost module that holds all of these, "" for the model."""
    parts = zip(*(n.split(".") for n in names), strict=False)
    return ".".join(p[0] for p in takewhile(lambda p: len(set(p)) == 1, parts))


def _conv_lists(module: nn.Module, name: str, least: int) -> Iterator[tuple[str, _Elements]]:
    """Outermost sequences of which at least half the elements with weights are blocks of `least` layers or more.

    A convolution with its norm is no residual block, and half leaves room for a stem and an end in the same sequence.
    A stage may be one residual block, but one convolution is no sequence.
    """
    module = unwrapped(module)
    if isinstance(module, nn.Sequential | nn.ModuleList):
        held = [(conv_rank(e), len(weight_layers(e))) for e in module]
        weighty = sum(size > 0 for _, size in held)
        blocks = sum(rank > 0 and size >= least for rank, size in held)
        if 2 * blocks >= weighty and blocks >= (2 if least == 1 else 1):
            yield name, _elements(module)
            return
    for child_name, child in module.named_children():
        yield from _conv_lists(child, join(name, child_name), least)


def _conv_blocks(name: str, elements: _Elements, least: int) -> list[tuple[str, nn.Module, str]]:
    """(name, module, stage) of the blocks in a sequence, those of sequences of blocks inside it one by one."""
    inner = {n: list(_conv_lists(e, join(name, n), least)) for n, e in elements}
    nested = least > 1 and any(inner.values())
    found: list[tuple[str, nn.Module, str]] = []
    for key, element in elements:
        own = join(name, key)
        if nested and inner[key]:
            found += [(n, m, own) for list_name, es in inner[key] for n, m, _ in _conv_blocks(list_name, es, least)]
        elif conv_rank(element):
            found.append((own, element, own if nested else name))
    return found


@dataclass(frozen=True)
class Places:
    """Where adapters go in one block; names are relative to the block, and "" is the block itself.

    A convolutional block is one part, its output that of the residual sum.

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
    if is_convolutional(block):
        return Places((), "", "", "")
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
