"""Which parameter learns how fast, and from which step on. Pure functions of names, settings and step."""

import fnmatch
from collections.abc import Mapping, Sequence

from lora_ft.errors import UsageError
from lora_ft.recipe import TrainSection
from lora_ft_adapters.targets import block_of


def rate_scales(names: Sequence[str], settings: TrainSection, method_scales: Mapping[str, float]) -> dict[str, float]:
    """Factor on the learning rate of each parameter.

    The product of: the method's own factor (LoRA+), `layer_lr_decay` to the power of the blocks above the parameter's
    own (Howard and Ruder 2018, arXiv:1801.06146), and the first of `lr_multipliers` whose glob matches the name.

    Raises:
        UsageError: a glob of `lr_multipliers` that matches no parameter.
    """
    depth = depths(names)
    top = max((d for n, d in depth.items() if block_of(n) is not None), default=0)
    idle = [g for g in settings.lr_multipliers if not any(_glob(g, n) for n in names)]
    if idle:
        raise UsageError(
            f"train.lr_multipliers: {idle[0]!r} matches no parameter that trains",
            why=f"names look like {names[0]}",
            fix="a glob over whole names, such as '*lora_B*' or '*.layers.11.*'",
        )
    scales = {}
    for name in names:
        own = next((f for part, f in method_scales.items() if f".{part}." in name), 1.0)
        given = next((f for g, f in settings.lr_multipliers.items() if _glob(g, name)), 1.0)
        below_top = max(0, top - depth[name])
        scales[name] = own * given * (settings.layer_lr_decay or 1.0) ** below_top
    return scales


def depths(names: Sequence[str]) -> dict[str, int]:
    """The block of each parameter; what comes before the first block is one below it, what comes after one above."""
    blocks = {n: b for n in names if (b := block_of(n)) is not None}
    first, last = min(blocks.values(), default=0), max(blocks.values(), default=0)
    found, seen = {}, False
    for name in names:
        seen = seen or name in blocks
        found[name] = blocks.get(name, last + 1 if seen or not blocks else first - 1)
    return found


def waiting(names: Sequence[str], step: int, every: int | None) -> frozenset[str]:
    """The parameters that do not train yet at optimizer step `step` (from 0) of gradual unfreezing.

    The uppermost block and what lies above it train from the start, the next lower block after `every` steps, and so
    on; embeddings come last.
    """
    if every is None:
        return frozenset()
    depth = depths(names)
    levels = sorted(set(depth.values()), reverse=True)
    above = 2 if len(levels) > 1 and any(block_of(n) is None for n in names if depth[n] == levels[0]) else 1
    awake = set(levels[: above + step // every])
    return frozenset(n for n in names if depth[n] not in awake)


def _glob(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)
