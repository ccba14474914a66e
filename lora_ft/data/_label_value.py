"""The label of a row: a class, several classes, or a number."""

from collections.abc import Mapping
from typing import Any

from ._values import absent, list_of, number_of

NUMBERS = ("score", "rating")
SEVERAL = "labels"
LABEL_NAMES = (SEVERAL, "category", "intent", "sentiment", "class", *NUMBERS)


def label_fields(row: Mapping[str, Any], column: str | None, answered: bool) -> dict[str, Any]:
    """`label`, or `labels` where there are several; nothing when it is missing and may be.

    Args:
        row: values by column.
        column: the one that holds the label; None: there is none.
        answered: whether it must be there.

    Raises:
        ValueError: missing, or neither a class nor a number.
    """
    value: Any = None if column is None else row[column]
    if column is None or (absent(value) and not (column == SEVERAL and value == "")):
        if answered:
            raise ValueError(f"the label is missing: {'no such column' if column is None else f'{column!r} is empty'}")
        return {}
    if hasattr(value, "dtype") and value.ndim == 0:
        value = value.item()
    if column in NUMBERS:
        return {"label": number_of(value, column)}
    if isinstance(value, list | tuple) or (column == SEVERAL and isinstance(value, str)):
        return {"labels": [class_of(v, column) for v in list_of(value, column, "|")]}
    if isinstance(value, int | float) and not isinstance(value, bool):
        number_of(value, column)
        return {"label": value}
    return {"label": class_of(value, column)}


def class_of(value: Any, column: str) -> str:
    """The name of a class; raises ValueError."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise ValueError(f"column {column!r} must hold a class or a number, got {type(value).__name__}")
    name = str(value).strip()
    if not name:
        raise ValueError(f"column {column!r} holds an empty class name")
    return name
