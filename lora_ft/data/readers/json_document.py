"""JSON: a list of objects, alone or under one key."""

from collections.abc import Iterator
from pathlib import Path

from lora_ft.data._row import Row, text_of_file
from lora_ft.errors import DataError

from ._json import parse

SUFFIXES = (".json",)


def read(path: Path) -> Iterator[Row]:
    """A row for each object of the list; of {"data": [...]}, the one list that there is under any key."""
    try:
        value = parse(text_of_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=str(path)) from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(row, dict):
            raise DataError(f"a row is a JSON object, this is {type(row).__name__}", where=f"{path} row {number}")
        yield Row(row, f"{path} row {number}")
