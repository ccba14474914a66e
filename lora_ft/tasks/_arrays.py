"""Rows of arrays for a module: read and checked, and as a batch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_ft.records import Batch, Example, Sample

INPUTS, TARGET = "inputs", "target"
SHOWN = 8  # numbers of an array that people see
Array = NDArray[Any]


def inputs_of(example: Example) -> dict[str, Array]:
    """The row's inputs: {"inputs": array}, or {"inputs.NAME": array} for each of several.

    Raises:
        ValueError: no array of finite numbers.
    """
    given = example.fields.get(INPUTS)
    if given is None or (isinstance(given, Mapping) and not given):
        raise ValueError("the row has no inputs")
    if isinstance(given, Mapping):
        return {f"{INPUTS}.{name}": array_of(value, f"input {name!r}") for name, value in given.items()}
    return {INPUTS: array_of(given, "inputs")}


def by_name(example: Example, inputs: dict[str, Array], columns: Sequence[str]) -> dict[str, Array]:
    """The inputs of a table's row with its numbers in the order of training's columns.

    Raises:
        ValueError: columns that training did not have, or lacks of them.
    """
    found = list(example.fields.get("columns", columns))
    if found == list(columns):
        return inputs
    missing, extra = [c for c in columns if c not in found], [c for c in found if c not in columns]
    if missing or extra:
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)} beside them"] * bool(extra)
        raise ValueError(f"the model was trained on the columns {', '.join(columns)}; this row {' and '.join(said)}")
    return {name: array[[found.index(c) for c in columns]] for name, array in inputs.items()}


def array_of(value: Any, what: str) -> Array:
    """An array; floating numbers in float32.

    Raises:
        ValueError: ragged, text, or not finite.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{what} has lists of different lengths") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} must hold numbers, got {_shorten(repr(value))}")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise ValueError(f"{bad} of {array.size} numbers of {what} are NaN, infinite or too large for float32")
    return array


def shapes_of(arrays: Mapping[str, Array]) -> dict[str, list[int]]:
    """The shape of each, as JSON has it."""
    return {name: list(array.shape) for name, array in arrays.items()}


def check_shapes(arrays: Mapping[str, Array], first: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError for another shape, or other names, than the first row has."""
    for name, shape in first.items():
        if name not in arrays:
            if name == TARGET:  # a row to predict
                continue
            raise ValueError(f"the row has no {_spoken(name)}, which the first row has")
        got = list(arrays[name].shape)
        if got != list(shape):
            raise ValueError(f"{_spoken(name)} has the shape {_shape(got)}, in the first row it is {_shape(shape)}")
    more = [name for name in arrays if name not in first]
    if more:
        raise ValueError(f"the row has {_spoken(more[0])}, which the first row has not")


def stacked(samples: Sequence[Sample]) -> Batch:
    """The inputs (B, ...) by name, and "labels" where all samples have a target; whole numbers as int64."""
    names = [n for n in samples[0].inputs if n != TARGET]
    batch = {n: _tensor([s.inputs[n] for s in samples]) for n in names}
    if all(TARGET in s.inputs for s in samples):
        batch["labels"] = _tensor([s.inputs[TARGET] for s in samples])
    return batch


def model_arguments(batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The batch's inputs as positional and as named arguments of the model."""
    named = {k.removeprefix(f"{INPUTS}."): v for k, v in batch.items() if k.startswith(f"{INPUTS}.")}
    return ([batch[INPUTS]] if INPUTS in batch else []), named


def shown(inputs: Mapping[str, Any]) -> str:
    """The inputs in one line for people, long arrays in part."""
    parts = []
    for name, array in inputs.items():
        flat = np.asarray(array).ravel()
        text = " ".join(f"{x:.6g}" for x in flat[:SHOWN].tolist()) + (" ..." if flat.size > SHOWN else "")
        shape = f" {_shape(np.shape(array))}" if np.ndim(array) > 1 else ""
        label = name.removeprefix(INPUTS).removeprefix(".")
        parts.append(f"{label}{' = ' if label else ''}[{text}]{shape}")
    return ", ".join(parts)


def number(value: float) -> float | int:
    """Six digits, as people read them."""
    return float(f"{value:.6g}") if math.isfinite(value) else value


def _tensor(arrays: Sequence[Array]) -> Tensor:
    tensor = torch.from_numpy(np.stack(arrays))
    return tensor if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor.long()


def _spoken(name: str) -> str:
    return f"input {name.removeprefix(f'{INPUTS}.')!r}" if name.startswith(f"{INPUTS}.") else name


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})" if len(shape) else "of a single number"


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
