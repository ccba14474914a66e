"""Which modules an adapter will wrap, and why a name matches none.

An entry of `target_modules` is one of

    q_proj, encoder.layer.3.attention    a module's whole dotted name or its last part or parts (PEFT's rule)
    *.attention.*, conv[12]              a glob over whole dotted names (it has one of * ? [)
    re:.*\\.(q|v)_proj                    a regular expression that matches the whole name
    type:Conv2d                          every module whose class has this name
    all-linear                           every linear layer but the output head (PEFT's rule)
    all-conv                             every convolution that LoRA can be merged into: no groups, no dilation
    layers:8-11, layers:-4               keeps, of what the other entries match, blocks 8 to 11, or the last four, of
                                         each stack (an encoder-decoder has two)

A string that is not in a list is `all-linear`, `all-conv` or a regular expression, as in PEFT.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from .blocks import Block, block_at, stacks, unused_blocks
from .errors import AdapterError, nearest
from .modules import has_attention, is_linear, linear_sizes, takes_lora, unwrapped, walk

_GLOB = re.compile(r"[*?\[]")
ALL_CONV = "all-conv"
# Share of the weights of linear layers and convolutions. Patch embeddings and feature extractors in front of attention
# hold less than 0.1 (ViT, ConvNeXt's stem, wav2vec2, Whisper, CLIP), convolutional parts more than 0.3 (SegFormer-B0
# 0.33, MobileViT 0.41, DETR with ResNet-50 0.58).
_CONVOLUTIONAL = 0.25


def plain_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by name as they were before any adapter: wrappers give way to what they wrap."""
    root: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return [(name, module) for name, module in walk(root) if name]


def matches(pattern: str, module_name: str) -> bool:
    """PEFT's rule for one entry of a list: the whole dotted name, or its last part or parts."""
    return module_name == pattern or module_name.endswith(f".{pattern}")


def resolve_targets(model: nn.Module, target_modules: str | Iterable[str]) -> str | list[str]:
    """`target_modules` as PEFT understands it: globs, types and layer ranges become whole module names.

    Raises:
        AdapterError: an entry matches no module; names it, and the nearest module names with their counts.
    """
    target_modules = [ALL_CONV] if target_modules == ALL_CONV else target_modules
    if isinstance(target_modules, str):
        check_targets(model, target_modules)
        return target_modules
    entries = list(target_modules)
    check_targets(model, entries)
    if not any(_is_pattern(e) for e in entries):
        return entries
    ranges = [e for e in entries if e.startswith("layers:")]
    rest = [e for e in entries if not e.startswith("layers:")] or ["all-linear"]
    chosen = {n for e in rest for n in _select(e, model)}
    blocks = stacks(model) if ranges else []
    for entry in ranges:
        inside = {b.name for b in _in_range(entry, blocks)}
        chosen = {n for n in chosen if (b := block_at(n, blocks)) is not None and b.name in inside}
    if not chosen:
        raise AdapterError(f"target_modules: nothing that {', '.join(rest)} matches lies in {', '.join(ranges)}")
    return [n for n, _ in plain_modules(model) if n in chosen]


def check_targets(model: nn.Module, target_modules: str | Iterable[str] | None, option: str = "target_modules") -> None:
    """Refuse an entry of `target_modules` that matches no module of `model`.

    PEFT stays silent when one of several names matches nothing, and half of the adapter is missing.

    Raises:
        AdapterError: names each entry without a match, and the nearest module names with their counts.
    """
    if target_modules is None or target_modules == "all-linear":
        return
    if isinstance(target_modules, str):
        _check_regex(target_modules, [n for n, _ in plain_modules(model)])
        return
    target_modules = list(target_modules)
    odd = [p for p in target_modules if not isinstance(p, str)]
    if odd:
        raise AdapterError(f"{option}: {odd[0]!r} is no name")
    missing = [p for p in target_modules if not p.startswith("layers:") and not _select(p, model)]
    if missing:
        hints = "; ".join(f"{p!r} matches no module{_hint(p, model)}" for p in missing)
        raise AdapterError(
            f"{option}: {hints}",
            "use one of the names above" + (", a regex, or all-linear" if option == "target_modules" else ""),
        )


def all_linear(model: nn.Module) -> list[str]:
    """Names of the linear layers but the output head, as PEFT's `all-linear` chooses them."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    inside = unwrapped(head) if head is not None else None
    return [n for n, m in plain_modules(model) if is_linear(m) and m is not inside]


def body(model: nn.Module, modules_to_save: Iterable[str] | None) -> tuple[list[str], list[str], bool]:
    """(linear layers, convolutions, whether these are all but those in `modules_to_save`) to adapt by default.

    Convolutions count where the model has them and no attention, or where they hold a quarter of its weights. Blocks
    that the model never uses are left out.
    """
    saved, idle = list(modules_to_save or ()), unused_blocks(model)
    named = dict(plain_modules(model))
    linear = [n for n in all_linear(model) if not _inside(n, saved)]
    used = [n for n in linear if not block_at(n, idle)]
    convolutions = [n for n in _all_conv(model) if not _inside(n, saved)]
    if convolutions and has_attention(unwrapped(getattr(model, "get_base_model", lambda: model)())):
        size = sum(named[n].get_parameter("weight").numel() for n in convolutions)
        whole = size + sum(i * o for i, o in (linear_sizes(named[n]) for n in linear))
        convolutions = convolutions if size >= _CONVOLUTIONAL * whole else []
    return used, convolutions, len(used) == len(linear)


def _all_conv(model: nn.Module) -> list[str]:
    return [n for n, m in plain_modules(model) if takes_lora(m)]


def _inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules`, by PEFT's rule, or in one."""
    parts = name.split(".")
    return any(matches(m, ".".join(parts[:i])) for m in modules for i in range(1, len(parts) + 1))


def _is_pattern(entry: str) -> bool:
    return (
        entry in ("all-linear", ALL_CONV) or entry.startswith(("re:", "type:", "layers:")) or bool(_GLOB.search(entry))
    )


def _select(entry: str, model: nn.Module) -> list[str]:
    named = plain_modules(model)
    names = [n for n, _ in named]
    if entry == "all-linear":
        return all_linear(model)
    if entry == ALL_CONV:
        return _all_conv(model)
    if entry.startswith("type:"):
        return [n for n, m in named if type(m).__name__ == entry.removeprefix("type:")]
    if entry.startswith("re:"):
        expression = _compile(entry.removeprefix("re:"))
        return [n for n in names if expression.fullmatch(n)]
    if _GLOB.search(entry):
        # Containers match a wide glob too; only modules that hold weights themselves can be wrapped.
        holds = {n for n, m in named if any(True for _ in m.parameters(recurse=False))}
        return [n for n in names if n in holds and fnmatch.fnmatchcase(n, entry)]
    return [n for n in names if matches(entry, n)]


def _in_range(entry: str, blocks: Sequence[Block]) -> list[Block]:
    """The blocks that `layers:a-b`, `layers:a` or `layers:-n` stands for, in every stack."""
    found = re.fullmatch(r"(\d+)-(\d+)|(\d+)|-([1-9]\d*)", entry.removeprefix("layers:"))
    if not found:
        raise AdapterError(f"target_modules: {entry!r} is no range", "layers:8-11, layers:3, or layers:-4 (the last)")
    if not blocks:
        raise AdapterError(f"target_modules: {entry!r}, but this model has no list of blocks", "use whole names")
    first, last, one, back = found.groups()
    size = Counter(b.stack for b in blocks)
    if back:
        return [b for b in blocks if b.index >= size[b.stack] - int(back)]
    low, high = int(first or one), int(last or one)
    most = max(size.values()) - 1
    if low > high or high > most:
        raise AdapterError(f"target_modules: {entry!r}, but the model has blocks 0 to {most}")
    return [b for b in blocks if low <= b.index <= high]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"target_modules: {pattern!r} is no regular expression: {error}") from error


def _check_regex(pattern: str, names: list[str]) -> None:
    expression = _compile(pattern)
    if not any(expression.fullmatch(n) for n in names):
        raise AdapterError(
            f"target_modules: the regex {pattern!r} matches the whole name of no module; names look like {names[-1]!r}",
            "start the regex with .* or give a list of names",
        )


def _hint(pattern: str, model: nn.Module) -> str:
    weighty = [(n, m) for n, m in plain_modules(model) if hasattr(m, "weight")]
    if pattern.startswith("type:"):
        kinds = Counter(type(m).__name__ for _, m in weighty)
        return " (there are: " + ", ".join(f"{n} x{c}" for n, c in kinds.most_common(6)) + ")"
    last = Counter(n.rsplit(".", 1)[-1] for n, _ in weighty)
    last = Counter({n: c for n, c in last.items() if not n.isdigit()})
    best = nearest(pattern.rsplit(".", 1)[-1], last) or [n for n, _ in last.most_common(6)]
    return " (nearest: " + ", ".join(f"{n} x{last[n]}" for n in best) + ")" if best else ""
