"""Rows from what a Python program has in memory: arrays, tensors, a torch Dataset, a table, or a list of dicts."""

from collections.abc import Mapping
from typing import Any

from lora_ft.errors import DataError

from ._row import Row

TAKEN = (
    "(X, y) of arrays or tensors; a dict of arrays by column, such as {'inputs': X, 'target': y}; a torch Dataset with "
    "a length, whose items are (x, y) or dicts; or a list of dicts"
)
INPUTS, TARGET = "inputs", "target"


def rows_of(data: Any, name: str = "data") -> list[Row]:
    """A row for each sample; its place is `name[i]`, with i from 0 as in Python.

    Columns stay as they are called, so that every format of `lora-ft list formats` can take them; those of (X, y) are
    called inputs and target. Tensors become NumPy arrays.

    Args:
        data: (X, y), X an array or a dict of arrays by name; a dict of arrays or lists by column; a pandas DataFrame;
            a torch Dataset whose items are (x, y) or dicts; a list of these.
        name: of the data, for messages.

    Raises:
        DataError: something else, columns of different lengths, or nothing in it.
    """
    if hasattr(data, "columns") and hasattr(data, "to_dict"):
        data = data.to_dict("list")
    if isinstance(data, Mapping):
        rows = _columns(data, name)
    elif isinstance(data, tuple) and len(data) == 2 and not isinstance(data[1], Mapping):
        inputs = _columns(data[0], name) if isinstance(data[0], Mapping) else None
        rows = _columns({INPUTS: data[0] if inputs is None else inputs, TARGET: data[1]}, name)
    else:
        rows = _items(data, name)
    if not rows:
        raise DataError("there is no row", where=name)
    return [Row(values, f"{name}[{i}]") for i, values in enumerate(rows)]


def _columns(columns: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    lengths = {}
    for key, column in columns.items():
        if isinstance(column, str) or not hasattr(column, "__len__") or getattr(column, "ndim", 1) == 0:
            raise DataError(
                f"{key!r} is a {type(column).__name__}, not an array or list whose first dimension is the rows",
                where=name,
                fix=f"give {TAKEN}",
            )
        lengths[str(key)] = len(column)
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{k} {n}" for k, n in lengths.items())
        raise DataError(f"the columns have different numbers of rows: {shown}", where=name)
    arrays = {str(k): _plain(v) for k, v in columns.items()}
    return [{k: _plain(v[i]) for k, v in arrays.items()} for i in range(next(iter(lengths.values()), 0))]


def _items(data: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(data, str | bytes) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        endless = hasattr(data, "__iter__") and not isinstance(data, str | bytes)
        raise DataError(
            f"this {type(data).__name__} is no data" + (": it has no length" if endless else ""),
            where=name,
            fix=f"give {TAKEN}",
        )
    rows = []
    for i in range(len(data)):
        try:
            item = data[i]
        except Exception as error:  # a Dataset of the user's own may raise anything
            raise DataError(
                f"{type(data).__name__} gives no item: {type(error).__name__}: {error}", where=f"{name}[{i}]"
            ) from error
        rows.append(_row(item, f"{name}[{i}]"))
    return rows


def _row(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {str(k): _plain(v) for k, v in item.items()}
    pair = isinstance(item, tuple) or (isinstance(item, list) and any(hasattr(part, "shape") for part in item))
    if pair and len(item) in (1, 2):
        return dict(zip((INPUTS, TARGET), map(_plain, item), strict=False))
    if getattr(item, "ndim", 0) > 0:
        return {INPUTS: _plain(item)}
    size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise DataError(f"an item is a {type(item).__name__}{size}", where=where, fix=f"give {TAKEN}")


def _plain(value: Any) -> Any:
    """Tensors as arrays, single numbers as Python's own; all else as it is."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value
