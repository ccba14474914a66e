"""Columns of a file under the names that a format knows, and the group of each row."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_ft.errors import DataError, Problem, did_you_mean

from ._row import Row
from ._values import absent


def renamed(rows: Sequence[Row], columns: Mapping[str, str], source: str, answered: bool) -> Sequence[Row]:
    """The rows with the format's column names.

    Args:
        rows: as read.
        columns: the format's column name -> the file's; `a.b` is the part b of the objects in column a.
        source: for messages.
        answered: whether every column must be there.

    Raises:
        DataError: a column that is not there.
    """
    if not columns:
        return rows
    rows = _with_parts(rows, set(columns.values()))
    found = _union(rows)
    for wanted, theirs in columns.items():
        if theirs not in found and wanted not in found and answered:
            raise DataError(
                f"data.columns: there is no column {theirs!r} (for {wanted!r}); {did_you_mean(theirs, found)}",
                where=source,
            )
    back = {theirs: ours for ours, theirs in columns.items() if theirs in found}
    return [
        replace(r, values={back.get(k, k): v for k, v in r.values.items() if k in back or k not in back.values()})
        for r in rows
    ]


def groups(rows: Sequence[Row], column: str | None, source: str, needed: bool = True) -> list[str]:
    """The group of each row, "" where there are none, and where rows that are not to be split lack the column.

    Raises:
        DataError: no such column, or rows without a value in it.
    """
    found = _union(rows) if column is not None else {}
    if column is None or (not needed and column not in found):
        return [""] * len(rows)
    if column not in found:
        raise DataError(
            f"data.group_column: there is no column {column!r}; {did_you_mean(column, found)}", where=source
        )
    values = [_text(r.values.get(column)) for r in rows]
    problems = (
        []
        if not needed
        else [
            Problem(f"the group column {column!r} is empty", r.where)
            for r, v in zip(rows, values, strict=True)
            if not v
        ]
    )
    if problems:
        raise DataError.collect(problems, title=f"{len(problems)} of {len(rows)} rows have no group ({column!r})")
    return values


def aligned(rows: Sequence[Row], without: str | None) -> list[Row]:
    """All rows with the same columns in the same order, None where a row lacks one; the group is no input."""
    columns = [c for c in _union(rows) if c != without]
    return [replace(r, values={c: r.values.get(c) for c in columns}) for r in rows]


def _union(rows: Sequence[Row]) -> dict[str, None]:
    return dict.fromkeys(column for r in rows for column in r.values)


def _text(value: Any) -> str:
    return "" if absent(value) else str(value)


def _with_parts(rows: Sequence[Row], names: set[str]) -> Sequence[Row]:
    """The rows with a further column for each name `a.b` that is a path into a column of objects."""
    found = _union(rows)
    paths = [name.split(".") for name in names if name not in found and name.split(".")[0] in found]
    if not any(len(path) > 1 for path in paths):
        return rows
    return [
        replace(r, values={**r.values, **{".".join(p): v for p in paths if (v := _part(r.values, p)) is not None}})
        for r in rows
    ]


def _part(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
