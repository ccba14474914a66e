"""What the held-out figures of a finished run give reason to doubt."""

from collections.abc import Mapping
from typing import Any


def doubts(before: Mapping[str, float], after: Mapping[str, float], tables: Mapping[str, Any]) -> list[str]:
    """A sentence for each sign that the adapter learned nothing of use; none is an error.

    Args:
        before: metrics of the base.
        after: metrics of the adapter.
        tables: the task's tables for the adapter.
    """
    found = []
    if "loss" in before.keys() & after.keys() and not after["loss"] < before["loss"]:
        found.append(
            f"the held-out loss did not fall: {before['loss']:.4f} before, {after['loss']:.4f} after; try another "
            "train.learning_rate, more steps, or rows that are more like the held-out ones"
        )
    confusion = tables.get("confusion_matrix", {"labels": [], "rows": []})
    rows = confusion["rows"]
    given = [label for label, *column in zip(confusion["labels"], *rows, strict=True) if any(column)]
    if len(given) == 1 and sum(map(any, rows)) > 1:
        found.append(
            f"every held-out row gets {given[0]!r}, whatever is in it: the model has collapsed to one answer; try a "
            "lower train.learning_rate, or data.sampling: balanced if most rows are of that class"
        )
    return found
