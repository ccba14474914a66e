"""Arrays of numbers for modules: NumPy archives, and rows of lists."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, as_object
from lora_ft.registry import FORMATS

ALIASES = {"inputs": ("x", "X", "features"), "target": ("targets", "y", "Y", "labels", "label")}


class Arrays(RowFormat):
    """Inputs of any shape under one name or several, and a target."""

    kind = "arrays"
    name = "arrays"
    description = (
        "inputs (or x): numbers, or several by name; target (or y). In .npz files every other array is an input."
    )
    required = ("inputs", "target")
    answer = "target"
    aliases = ALIASES

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """A target, and inputs that are arrays, lists or named lists."""
        if self.named("target", columns) is None or not first_rows:
            return False
        name = self.named("inputs", columns)
        return _from_numpy(first_rows[0]) or (name is not None and _is_array(first_rows[0].get(name)))

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Inputs as NumPy arrays in the numbers' own precision; a target of one number as Python's number."""
        target, name = self.named("target", row), self.named("inputs", row)
        if _from_numpy(row):
            others = {k: v for k, v in row.items() if k != target}
            given = others[name] if name is not None and len(others) == 1 else others
        else:
            given = as_object(row.get(name or "inputs"), "inputs")
        if isinstance(given, Mapping):
            inputs: Any = {k: array_of(v, k) for k, v in given.items()}
        else:
            inputs = array_of(given, name or "inputs")
        if isinstance(inputs, Mapping) and not inputs:
            raise ValueError("there are no inputs")
        if target is None or absent(row[target]):
            if answered:
                raise ValueError(f"column 'target' is missing or empty; found: {', '.join(row)}")
            return {"inputs": inputs}
        found = array_of(as_object(row[target], target), target)
        return {"inputs": inputs, "target": found.item() if found.ndim == 0 else found}


def _from_numpy(row: Mapping[str, Any]) -> bool:
    return any(hasattr(v, "dtype") for v in row.values())


def _is_array(value: Any) -> bool:
    return isinstance(value, list | Mapping) or (isinstance(value, str) and value.lstrip().startswith(("[", "{")))


def array_of(value: Any, column: str) -> Any:
    """A NumPy array of finite numbers; raises ValueError."""
    import numpy as np

    if absent(value):
        raise ValueError(f"column {column!r} is missing or empty")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"column {column!r} holds lists of different lengths") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"column {column!r} must hold numbers")
    if array.size == 0:
        raise ValueError(f"column {column!r} is empty")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"column {column!r} holds NaN or infinity")
    return array


FORMATS.register(Arrays())
