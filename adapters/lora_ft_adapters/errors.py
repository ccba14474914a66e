"""The one error of the adapter utility: what is wrong, what was got, what is allowed, what to do."""

import difflib
from collections.abc import Iterable


class AdapterError(ValueError):
    """An adapter that cannot be built, applied, loaded or merged as asked.

    Attributes:
        fix: what to do about it, in one line, or "".
    """

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The names in `allowed` that look most like `name`, best first."""
    pool = sorted(set(allowed))
    lower = {a.lower(): a for a in pool}
    hits = difflib.get_close_matches(name.lower(), lower, n=count, cutoff=0.5)
    return [lower[h] for h in hits]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence that names the nearest allowed names, or lists some of them when none is near."""
    pool = sorted(set(allowed))
    hits = nearest(name, pool)
    if hits:
        return "did you mean " + " or ".join(repr(h) for h in hits) + "?"
    shown = ", ".join(pool[:12])
    return f"allowed: {shown}" + (f" and {len(pool) - 12} more" if len(pool) > 12 else "")
