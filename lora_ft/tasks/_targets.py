"""Targets of a module's rows: classes, shares from 0 to 1, or numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_ft.records import Example

from ._arrays import TARGET, Array, array_of
from ._base import IGNORE
from ._labels import label_ids, label_name
from ._named_losses import CLASS, NUMBER

TOLERANCE = 1e-3  # of probabilities that should sum to 1


def target_of(example: Example, kind: str, *, soft: bool, labels: Sequence[str] | None) -> Array | None:
    """The row's target as the loss takes it; None where it has none.

    Args:
        example: with or without a target.
        kind: class, share or number.
        soft: whether classes come as probabilities.
        labels: names of the classes, where the recipe lists them.

    Raises:
        ValueError: it is none that the loss can take.
    """
    value = example.fields.get(TARGET)
    if value is None:
        return None
    if isinstance(value, str):
        if labels is None or kind != CLASS:
            raise ValueError(f"target is text ({value!r}): list the classes in task.labels, or give numbers")
        value = label_ids([label_name(value)], labels)[0]
    target = array_of(value, TARGET)
    if kind == NUMBER:
        return target.astype(np.float32)
    if kind == CLASS:
        return _checked_probabilities(target.astype(np.float32)) if soft else _checked_classes(target)
    if target.min() < 0 or target.max() > 1:
        raise ValueError(f"target is from 0 to 1 for binary cross entropy, got {_outside(target):.6g}")
    return target.astype(np.float32)


def is_soft(example: Example) -> bool:
    """Whether the target is an array of floating numbers, which only probabilities of classes are."""
    value = example.fields.get(TARGET)
    try:
        array = np.asarray(value if value is not None else 0)
    except ValueError:  # ragged: `target_of` says so
        return False
    return array.ndim > 0 and array.dtype.kind == "f"


def classes_in(target: Array) -> list[int]:
    """The class numbers in it, or the largest one of probabilities; without those that do not count."""
    flat: Any = target.argmax(0) if target.dtype.kind == "f" else target
    return [int(c) for c in np.ravel(flat) if c != IGNORE]


def largest_class(target: Array) -> int:
    """The largest class number, or that of the last probability."""
    return len(target) - 1 if target.dtype.kind == "f" else max(classes_in(target), default=0)


def _checked_classes(target: Array) -> Array:
    strange = [x for x in target.ravel().tolist() if x != int(x) or (x < 0 and x != IGNORE)]
    if strange:
        raise ValueError(f"target is a class, a whole number from 0, got {strange[0]:.6g}")
    return target.astype(np.int64)


def _checked_probabilities(target: Array) -> Array:
    """Along the first dimension, the classes."""
    if target.ndim == 0:
        raise ValueError(f"target is one number ({target.item():.6g}); other rows have probabilities of the classes")
    off = np.abs(target.sum(0) - 1).max()
    if target.min() < 0 or off > TOLERANCE:
        raise ValueError(
            "a target of floating numbers is the probability of each class, which sum to 1; got "
            f"{' '.join(f'{x:.6g}' for x in target.ravel()[:6])} (class numbers are written without a point)"
        )
    return target


def _outside(target: Array) -> float:
    return float(target[(target < 0) | (target > 1)].ravel()[0])
