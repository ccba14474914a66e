"""The learning rate as a pure function of the step."""

import math


def rate_factor(kind: str, step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0) of `total`.

    A linear rise over `warmup` steps, then: linear to 0, half a cosine to 0, constant, or step (x0.1 after each third
    of what follows the warm-up). reduce_lr_on_plateau is constant here; evaluations scale it.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if kind == "step":
        return float(0.1 ** min(2, int(done * 3)))
    return 1.0
