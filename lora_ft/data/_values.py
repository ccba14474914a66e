"""Checks of single values that several formats share."""

import json
import math
from collections.abc import Mapping
from typing import Any


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A column's text; raises ValueError when it is missing, empty or not text."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"column {column!r} is missing; found: {', '.join(row)}")
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"column {column!r} is empty")
    return value


def as_object(value: Any, column: str) -> Any:
    """A list or object that may have been stored as JSON text (CSV and Parquet files do)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"column {column!r} is text but not JSON: {error}") from error


def absent(value: Any) -> bool:
    """Whether a cell holds nothing: None, an empty text, or the NaN that stands for nothing in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value)


def number_of(value: Any, column: str) -> float:
    """A finite number, which text may hold; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"column {column!r} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(f"column {column!r} must be a number, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"column {column!r} is {value!r}, which is not a finite number")
    return number


def list_of(value: Any, column: str, separator: str | None) -> list[Any]:
    """A list, as it is, as JSON text, or as text parted by `separator` (None: by spaces)."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be a list or text, got {type(value).__name__}")
    if value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None  # a text that begins with a bracket
        if isinstance(parsed, list):
            return parsed
    return [part.strip() for part in value.split(separator) if part.strip()]
