"""CSV and TSV with a header."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from lora_ft.data._row import Row, text_of_file
from lora_ft.errors import DataError

SUFFIXES = (".csv", ".tsv")


def read(path: Path) -> Iterator[Row]:
    """A row for each record; its place is the line where the record ends."""
    csv.field_size_limit(2**30)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text_of_file(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise DataError(f"more fields than the header's {len(reader.fieldnames or ())}", where=where)
            yield Row(row, where)
    except csv.Error as error:
        raise DataError(f"not {path.suffix[1:].upper()}: {error}", where=f"{path}:{reader.line_num}") from error
