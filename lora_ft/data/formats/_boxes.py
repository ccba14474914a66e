"""Checks of boxes that the formats for detection share."""

import math
from collections.abc import Sequence
from typing import Any

SHOWN = 3


def box_fields(boxes: Any, names: Any, crowd: Any = None) -> dict[str, Any]:
    """`boxes` and `labels`, and `crowd` where any box is one.

    Args:
        boxes: [[x, y, width, height]] in pixels.
        names: the class of each.
        crowd: whether each is a crowd, or None.

    Raises:
        ValueError: lists of different lengths, or a box that is none.
    """
    found = [box_of(b, n) for n, b in enumerate(plain_list(boxes, "boxes"), 1)]
    labels = [name_of(c, n) for n, c in enumerate(plain_list(names, "categories"), 1)]
    if len(found) != len(labels):
        raise ValueError(f"{len(found)} boxes but {len(labels)} categories")
    marks = [False] * len(found)
    if crowd is not None:
        marks = [crowd_of(c, n) for n, c in enumerate(plain_list(crowd, "iscrowd"), 1)]
    if len(marks) != len(found):
        raise ValueError(f"{len(found)} boxes but {len(marks)} values of iscrowd")
    fields: dict[str, Any] = {"boxes": found, "labels": labels}
    return {**fields, "crowd": marks} if any(marks) else fields


def plain_list(value: Any, what: str) -> list[Any]:
    """A list of a list, tuple or array; raises ValueError."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} must be a list, got {type(value).__name__}")
    return list(value)


def box_of(value: Any, number: int) -> list[float]:
    """Four finite numbers, the last two above 0; raises ValueError."""
    box = plain_list(value, f"box {number}")
    if len(box) != 4:
        raise ValueError(f"box {number} has {len(box)} numbers; a box is x, y, width, height")
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in box):
        raise ValueError(f"box {number} is {_short(box)}; a box is four finite numbers: x, y, width, height")
    if box[2] <= 0 or box[3] <= 0:
        raise ValueError(f"box {number} is {_short(box)}: its width and height (x, y, width, height) must be above 0")
    return [float(v) for v in box]


def name_of(value: Any, number: int) -> str:
    """The name of a box's class; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"the category of box {number} must be a name or a number, got {value!r}")
    return str(value).strip()


def crowd_of(value: Any, number: int) -> bool:
    """0 or 1, or a truth value; raises ValueError."""
    if value not in (0, 1, None):
        raise ValueError(f"iscrowd of box {number} is {value!r}; allowed: 0, 1")
    return bool(value)


def joined(problems: Sequence[str]) -> str:
    """The first few problems of one document, the rest counted."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _short(box: Sequence[Any]) -> str:
    return f"[{', '.join(repr(v)[:20] for v in box)}]"
