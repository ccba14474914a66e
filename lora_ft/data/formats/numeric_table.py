"""Tables of numbers: a target and, in every other column, a feature."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, number_of
from lora_ft.registry import FORMATS

ALIASES = {"target": ("label",)}


class NumericTable(RowFormat):
    """The features of a row in the order of the columns."""

    kind = "arrays"
    name = "numeric_table"
    description = "target (or label), and otherwise only columns of numbers, which are the inputs in their order."
    required = ("target",)
    answer = "target"
    aliases = ALIASES

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """A target and nothing but numbers beside it."""
        target = self.named("target", columns)
        features = columns - {target}
        return target is not None and bool(features) and all(_numbers(row, features) for row in first_rows)

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """All columns but the target as one array (features,), and their names."""
        import numpy as np

        target = self.named("target", row)
        columns = tuple(c for c in row if c != target)
        if not columns:
            raise ValueError("there is no column beside the target")
        given = {"inputs": np.array([number_of(_given(row, c), c) for c in columns]), "columns": columns}
        if target is None or absent(row[target]):
            if answered:
                raise ValueError(f"column 'target' is missing or empty; found: {', '.join(row)}")
            return given
        number = number_of(row[target], target)
        return {**given, "target": int(number) if _whole(row[target]) else number}


def _given(row: Mapping[str, Any], column: str) -> Any:
    if absent(row[column]):
        raise ValueError(f"column {column!r} is empty")
    return row[column]


def _numbers(row: Mapping[str, Any], columns: frozenset[str]) -> bool:
    try:
        for column in columns & row.keys():
            if not absent(row[column]):
                number_of(row[column], column)
    except ValueError:
        return False
    return True


def _whole(value: Any) -> bool:
    """Whether the file writes a whole number, without a point: a class rather than a quantity."""
    return isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdecimal())


FORMATS.register(NumericTable())
