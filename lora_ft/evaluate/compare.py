"""Base against adapter on the same rows: which rows flip, and how sure the difference is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """Rows by what the adapter did to them, and the paired difference of the share that is right.

    Attributes:
        gained: indices wrong before and right after.
        lost: right before and wrong after.
        both: number right both times.
        neither: number wrong both times.
        difference: after minus before.
        low: 2.5 % bound of the difference.
        high: 97.5 % bound.
    """

    gained: list[int]
    lost: list[int]
    both: int
    neither: int
    difference: float
    low: float
    high: float


def compare(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> Comparison:
    """Pair two judgements of the same rows; the interval is a percentile bootstrap over rows (2,000 resamples)."""
    pairs = list(zip(before, after, strict=True))
    deltas = [int(b) - int(a) for a, b in pairs]
    rng = random.Random(seed)
    n = len(deltas)
    means = sorted(sum(rng.choices(deltas, k=n)) / n for _ in range(RESAMPLES)) if n else [0.0]
    return Comparison(
        gained=[i for i, (a, b) in enumerate(pairs) if b and not a],
        lost=[i for i, (a, b) in enumerate(pairs) if a and not b],
        both=sum(a and b for a, b in pairs),
        neither=sum(not a and not b for a, b in pairs),
        difference=sum(deltas) / max(1, n),
        low=means[int(0.025 * len(means))],
        high=means[min(len(means) - 1, int(0.975 * len(means)))],
    )
