"""Class numbers -> class names, where the `datasets` library keeps the names beside the rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

LISTS = ("Sequence", "List", "LargeList")


def named(rows: Iterable[Mapping[str, Any]], features: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows with names in place of numbers.

    Args:
        rows: values by column.
        features: by column, as `datasets.Features.to_dict` writes them.
    """
    classes = {column: names for column, feature in features.items() if (names := _names(feature))}
    for row in rows:
        yield {**row, **{c: _name(row[c], names) for c, names in classes.items() if c in row}} if classes else row


def _names(feature: Any) -> Sequence[str] | None:
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") in LISTS:
        return _names(feature.get("feature"))
    names: Sequence[str] | None = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return names


def _name(value: Any, names: Sequence[str]) -> Any:
    """-1 stands for a row whose class is not given."""
    if isinstance(value, list):
        return [_name(v, names) for v in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
