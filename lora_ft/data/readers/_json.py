"""JSON as the standard has it, which is stricter than Python's parser."""

import json
from typing import Any, NoReturn


def parse(text: str) -> Any:
    """The value; raises ValueError for a key that stands twice, NaN, or half of an emoji escape."""
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    if "\\ud" in text.lower():  # an escaped lone surrogate passes json and breaks every tokenizer later
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a lone surrogate (half of an emoji escape)") from error
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(k for k, _ in pairs if sum(k == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
