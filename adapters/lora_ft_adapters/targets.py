"""Which modules an adapter will wrap, and why a name matches none."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from .errors import AdapterError, nearest


def matches(pattern: str, module_name: str) -> bool:
    """PEFT's rule for one entry of a list: the whole dotted name, or its last part or parts."""
    return module_name == pattern or module_name.endswith(f".{pattern}")


def check_targets(model: nn.Module, target_modules: str | Iterable[str] | None) -> None:
    """Refuse an entry of `target_modules` that matches no module of `model`.

    PEFT stays silent when one of several names matches nothing, and half of the adapter is missing.

    Raises:
        AdapterError: names each entry without a match, and the nearest module names with their counts.
    """
    if target_modules is None or target_modules == "all-linear":
        return
    names = [n for n, _ in model.named_modules() if n]
    if isinstance(target_modules, str):
        _check_regex(target_modules, names)
        return
    missing = [p for p in target_modules if not any(matches(p, n) for n in names)]
    if missing:
        hints = "; ".join(f"{p!r} matches no module{_hint(p, model)}" for p in missing)
        raise AdapterError(
            f"target_modules: {hints}", "use one of the names above, a regex, or target_modules: all-linear"
        )


def _check_regex(pattern: str, names: list[str]) -> None:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"target_modules: {pattern!r} is no regular expression: {error}") from error
    if not any(expression.fullmatch(n) for n in names):
        raise AdapterError(
            f"target_modules: the regex {pattern!r} matches the whole name of no module; names look like {names[-1]!r}",
            "start the regex with .* or give a list of names",
        )


def _hint(pattern: str, model: nn.Module) -> str:
    last = Counter(n.rsplit(".", 1)[-1] for n, m in model.named_modules() if n and hasattr(m, "weight"))
    last = Counter({n: c for n, c in last.items() if not n.isdigit()})
    best = nearest(pattern.rsplit(".", 1)[-1], last) or [n for n, _ in last.most_common(6)]
    return " (nearest: " + ", ".join(f"{n} x{last[n]}" for n in best) + ")" if best else ""
