"""Class numbers -> class names, where the `datasets` library keeps the names beside the rows."""

from collections.abc import Iterable, Iterator, Mapping
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


def _names(feature: Any) -> Any:
    """The names of a column of classes; of a column of objects, those of each of its parts that has some."""
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") in LISTS:
        return _names(feature.get("feature"))
    if "_type" in feature:
        return feature.get("names") if feature["_type"] == "ClassLabel" else None
    return {part: names for part, inner in feature.items() if (names := _names(inner))} or None


def _name(value: Any, names: Any) -> Any:
    """-1 stands for a row whose class is not given."""
    if isinstance(value, list):
        return [_name(v, names) for v in value]
    if isinstance(names, Mapping):
        if not isinstance(value, Mapping):
            return value
        return {k: _name(v, names[k]) if k in names else v for k, v in value.items()}
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
