"""Parquet and Arrow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_ft.data._label_names import named
from lora_ft.data._row import Row, missing
from lora_ft.errors import DataError

SUFFIXES = (".parquet", ".arrow")


def read(path: Path) -> Iterator[Row]:
    """A row for each row of the table; classes get the names that `datasets` wrote into the schema."""
    table = _table(path)
    written = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(written).get("info", {}).get("features", {})
    for number, row in enumerate(named(table.to_pylist(), features), 1):
        yield Row(row, f"{path} row {number}")


def _table(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing("pyarrow", path.suffix) from error
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_table(path)
        with pa.memory_map(str(path)) as source:
            try:
                return pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid:
                return pa.ipc.open_stream(source).read_all()
    except pa.ArrowException as error:
        raise DataError(f"not {path.suffix[1:]}: {error}", where=str(path)) from error
