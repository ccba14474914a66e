"""The one error of the adapter utility: what is wrong, what was got, what is allowed, what to do."""

import difflib
from collections.abc import Iterable

SHOWN = 16  # names in a message


class AdapterError(ValueError):
    """An adapter that cannot be built, applied, loaded or merged as asked.

    Attributes:
        fix: what to do about it, in one line, or "".
    """

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix


class UnmergeableError(AdapterError):
    """The adapter works, but no weight of the base can hold what it does."""


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The names in `allowed` that look most like `name`, best first."""
    scored = sorted(((_likeness(name.lower(), a.lower()), a) for a in set(allowed)), reverse=True)
    return [a for score, a in scored[:count] if score >= 0.55]


def _likeness(a: str, b: str) -> float:
    """Ratio of equal characters; words in another order, or a name inside the other, count too."""
    sorted_a, sorted_b = ("_".join(sorted(x.split("_"))) for x in (a, b))
    plain: float = difflib.SequenceMatcher(None, a, b).ratio()
    words: float = difflib.SequenceMatcher(None, sorted_a, sorted_b).ratio()
    inside = 0.6 + 0.4 * plain if min(len(a), len(b)) > 3 and (a in b or b in a) else 0.0
    return max(plain, 0.99 * words, inside)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence that names the nearest allowed names, or lists some of them when none is near."""
    pool = sorted(set(allowed))
    hits = nearest(name, pool)
    if hits:
        return "did you mean " + " or ".join(repr(h) for h in hits) + "?"
    shown = ", ".join(pool[:SHOWN])
    return f"allowed: {shown}" + (f" and {len(pool) - SHOWN} more" if len(pool) > SHOWN else "")
