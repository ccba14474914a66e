"""Which parameter learns how fast, and from which step on. Pure functions of names, settings and step."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from lora_ft.errors import UsageError
from lora_ft.recipe import TrainSection
from lora_ft_adapters.blocks import block_at, stacks

# Parameter name -> how many blocks of its stack are above its own; BELOW for what comes before all blocks wherever its
# name stands; None: before them if its name comes before theirs, else after.
Place = Callable[[str], int | None]
BELOW = -2


def block_places(model: nn.Module) -> Place:
    """Where the blocks of `model` are; a stack counts from its own top, so encoder and decoder run side by side.

    Layers without parameters (activations) are no blocks. Embeddings are below all blocks, also where a decoder or a
    shared relative position keeps its own behind blocks in the order of names; a head called embed_out is none.
    """
    blocks = [b for b in stacks(model) if next(b.module.parameters(), None) is not None]
    above: dict[str, int] = {}
    size = Counter(b.stack for b in blocks)
    for block in blocks:
        size[block.stack] -= 1
        above[block.name] = size[block.stack]
    root: nn.Module = getattr(model, "get_base_model", lambda: model)()
    head = getattr(root, "get_output_embeddings", lambda: None)()
    heads = tuple(f"{n}." for n, m in root.named_modules() if head is not None and m is head)

    def place(name: str) -> int | None:
        bare = name.removeprefix("base_model.model.")
        block = block_at(bare, blocks)
        if block is not None:
            return above[block.name]
        return BELOW if "embed" in bare.lower() and not bare.startswith(heads) else None

    return place


def below_top(names: Sequence[str], place: Place) -> dict[str, int]:
    """Blocks above each parameter; -1 for what comes after a block (the head), the most for what comes before.

    Raises:
        UsageError: no parameter is in a block.
    """
    placed = {n: place(n) for n in names}
    inside = {n: d for n, d in placed.items() if d is not None and d != BELOW}
    if not inside:
        raise UsageError(
            "train.layer_lr_decay and train.unfreeze_every go by blocks, and nothing that trains lies in one",
            fix="leave them out, or adapt layers inside the model's blocks",
        )
    deepest, seen, found = max(inside.values()), False, {}
    for name in names:
        seen = seen or name in inside
        after = seen and placed[name] != BELOW
        found[name] = inside.get(name, -1 if after else deepest + 1)
    return found


def rate_scales(
    names: Sequence[str], settings: TrainSection, method_scales: Mapping[str, float], place: Place
) -> dict[str, float]:
    """Factor on the learning rate of each parameter.

    The product of: the method's own factor (LoRA+), `layer_lr_decay` to the power of the blocks above the parameter's
    own (Howard and Ruder 2018, arXiv:1801.06146), and the first of `lr_multipliers` whose glob matches the name.

    Raises:
        UsageError: a glob of `lr_multipliers` that matches no parameter.
    """
    idle = [g for g in settings.lr_multipliers if not any(_glob(g, n) for n in names)]
    if idle:
        raise UsageError(
            f"train.lr_multipliers: {idle[0]!r} matches no parameter that trains",
            why=f"names look like {names[0]}",
            fix="a glob over whole names, such as '*lora_B*' or '*.layers.11.*'",
        )
    decay = settings.layer_lr_decay
    depth = below_top(names, place) if decay is not None else {}
    scales = {}
    for name in names:
        own = next((f for part, f in method_scales.items() if f".{part}." in name), 1.0)
        given = next((f for g, f in settings.lr_multipliers.items() if _glob(g, name)), 1.0)
        scales[name] = own * given * (decay or 1.0) ** max(0, depth.get(name, 0))
    return scales


def waking(names: Sequence[str], every: int | None, steps: int, place: Place) -> dict[str, int]:
    """The optimizer step (from 0) at which each parameter starts to train under gradual unfreezing.

    The uppermost block and what lies above it train from the start, the next lower block after `every` steps, and so
    on; embeddings come last.

    Raises:
        UsageError: some would never train.
    """
    if every is None:
        return dict.fromkeys(names, 0)
    depth = below_top(names, place)
    levels = sorted({max(0, d) for d in depth.values()})
    start = {n: levels.index(max(0, d)) * every for n, d in depth.items()}
    late = [n for n, s in start.items() if s >= steps]
    if late:
        raise UsageError(
            f"train.unfreeze_every: {every} leaves {len(late)} of {len(names)} tensors untrained after {steps} steps",
            fix=f"--set train.unfreeze_every={max(1, (steps - 1) // max(1, len(levels) - 1))}, or train longer",
        )
    return start


def _glob(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)
