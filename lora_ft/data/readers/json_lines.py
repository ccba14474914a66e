"""JSON lines: one object a line."""

import json
from collections.abc import Iterator
from pathlib import Path

from lora_ft.data._row import MAX_PROBLEMS, Row, text_of_file
from lora_ft.errors import DataError, Problem

from ._json import parse

SUFFIXES = (".jsonl", ".ndjson")


def read(path: Path) -> Iterator[Row]:
    """A row for each line that is not blank."""
    problems: list[Problem] = []
    for number, line in enumerate(text_of_file(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse(line)
            if not isinstance(value, dict):
                raise ValueError(f"a line is one JSON object, this is {type(value).__name__}")
            yield Row(value, f"{path}:{number}")
        except (ValueError, RecursionError) as error:
            why = f"not JSON: {error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            problems.append(Problem(f"{why}; it starts {line.strip()[:60]!r}", f"{path}:{number}"))
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise DataError.collect(problems, title=f"{len(problems)} lines are not JSON objects", fix="mend these lines")
