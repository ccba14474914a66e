"""The learning rate as a pure function of the step; what reduce_lr_on_plateau does to it is in `watch`."""

import math
from collections.abc import Mapping

from lora_ft.recipe import TrainSection
from lora_ft.recipe.training import SCHEDULE_OPTIONS

WARMUP_RATIO = 0.03


def warmup_steps(settings: TrainSection, total: int) -> int:
    """Optimizer steps in which the rate rises; none before one_cycle, which has a rise of its own."""
    if settings.lr_scheduler_type == "one_cycle":
        return 0
    ratio = WARMUP_RATIO if settings.warmup_ratio is None else settings.warmup_ratio
    return math.ceil(ratio * total)


def rate_factor(kind: str, step: int, total: int, warmup: int, options: Mapping[str, float] | None = None) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0) of `total`.

    A linear rise over `warmup` steps, then: linear to 0, half a cosine to 0, constant, step (x gamma after each
    step_size), or one_cycle (Smith and Topin 2018, arXiv:1708.07120; torch's OneCycleLR with its cosine, the rates
    only: momentum stays). reduce_lr_on_plateau is constant here; evaluations scale it.

    Args:
        kind: name of the schedule.
        step: from 0.
        total: steps in all.
        warmup: steps of the linear rise.
        options: of the schedule; what is left out has the recipe's default.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    given = {n: o.default for n, o in SCHEDULE_OPTIONS[kind].items()} | dict(options or {})
    after, length = step - warmup, max(1, total - warmup)
    if kind == "linear":
        return 1.0 - after / length
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * after / length))
    if kind == "step":
        size = given["step_size"] if given["step_size"] >= 1 else given["step_size"] * length
        return float(given["gamma"] ** math.floor(after / size + 1e-9))  # 3 / (0.1 * 6) is not quite 5 in floats
    if kind == "one_cycle":
        return _one_cycle(after, length, given)
    return 1.0


def _one_cycle(step: int, total: int, options: Mapping[str, float]) -> float:
    start = 1.0 / options["div_factor"]
    end = start / options["final_div_factor"]
    peak, last = options["pct_start"] * total - 1, total - 1
    if step <= peak:
        return _anneal(start, 1.0, step / peak if peak else 1.0)  # torch divides by zero where the first step is it
    return _anneal(1.0, end, (step - peak) / (last - peak))


def _anneal(start: float, end: float, done: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) / 2.0 * (math.cos(math.pi * done) + 1.0)
