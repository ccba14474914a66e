"""Rows from files: JSONL, JSON, CSV, TSV, Parquet, Arrow, text, a folder of these, a hub id, or `builtin:`.

Every row knows its place, so that an error can say `file:line`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from lora_ft.errors import DataError, Problem, did_you_mean

MAX_PROBLEMS = 50  # stop reading a file that is not what its name says


@dataclass(frozen=True, slots=True)
class Row:
    """Values by column, and where they stand."""

    values: Mapping[str, Any]
    where: str


def read_rows(source: str) -> list[Row]:
    """All rows of `source`, in order.

    Raises:
        DataError: missing, empty, unreadable, or lines that are not rows (each named).
    """
    if source.startswith("builtin:"):
        return _read_file(builtin_path(source.removeprefix("builtin:")))
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not found:
            raise DataError(f"no data file in this folder; readable: {' '.join(READERS)}", where=source)
        return [row for file in found for row in _read_file(file)]
    if path.is_file():
        return _read_file(path)
    if path.suffix.lower() in READERS or source.count("/") != 1 or source.startswith((".", "/", "~")):
        if not path.parent.is_dir():
            raise DataError(f"data file not found: the folder {path.parent} does not exist", where=source)
        nearby = [p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS]
        hint = f"; {did_you_mean(path.name, nearby)}" if nearby else f"; there is no data file in {path.parent}"
        raise DataError(f"data file not found{hint}", where=source)
    return _read_hub(source)


def builtin_path(name: str) -> Path:
    """The file of a data set that comes with the package."""
    folder = Path(str(files("lora_ft.data") / "builtin"))
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(f"no built-in data {name!r}; {did_you_mean(name, [p.stem for p in folder.glob('*.jsonl')])}")
    return path


def _read_file(path: Path) -> list[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"unknown kind of data file {path.suffix!r}; readable: {' '.join(READERS)}", where=str(path))
    try:
        rows = list(reader(path))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not rows:
        raise DataError("the data file has no rows", where=str(path))
    return rows


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x}",
            where=f"{path}:{line}",
            fix=f"iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix}",
        ) from error
    if "\0" in text:
        raise DataError("the text has a NUL character", where=f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}")
    return text


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(k for k, _ in pairs if sum(k == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse(text: str) -> Any:
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    if "\\ud" in text.lower():  # an escaped lone surrogate passes json and breaks every tokenizer later
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a lone surrogate (half of an emoji escape)") from error
    return value


def _jsonl(path: Path) -> Iterator[Row]:
    problems: list[Problem] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _parse(line)
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


def _json(path: Path) -> Iterator[Row]:
    try:
        value = _parse(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=str(path)) from error
    if isinstance(value, dict):  # {"data": [...]}: one list of rows under any key
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(row, dict):
            raise DataError(f"a row is a JSON object, this is {type(row).__name__}", where=f"{path} row {number}")
        yield Row(row, f"{path} row {number}")


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**30)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise DataError(f"more fields than the header's {len(reader.fieldnames or ())}", where=where)
            yield Row(row, where)
    except csv.Error as error:
        raise DataError(f"not {path.suffix[1:].upper()}: {error}", where=f"{path}:{reader.line_num}") from error


def _txt(path: Path) -> Iterator[Row]:
    """Documents parted by blank lines; a file without blank lines is one document a line."""
    text = _text(path)
    blank = "\n\n" in text.replace("\r\n", "\n").strip()
    start = 1
    for part in text.replace("\r\n", "\n").split("\n\n" if blank else "\n"):
        if part.strip():
            yield Row({"text": part.strip("\n")}, f"{path}:{start + len(part) - len(part.lstrip(chr(10)))}")
        start += part.count("\n") + (2 if blank else 1)


def _arrow(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise _missing("pyarrow", path.suffix) from error
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
        else:
            with pa.memory_map(str(path)) as source:
                try:
                    table = pa.ipc.open_file(source).read_all()
                except pa.ArrowInvalid:
                    table = pa.ipc.open_stream(source).read_all()
    except pa.ArrowException as error:
        raise DataError(f"not {path.suffix[1:]}: {error}", where=str(path)) from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield Row(row, f"{path} row {number}")


def _read_hub(name: str) -> list[Row]:
    hub_id, _, split = name.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", "hub data") from error
    try:
        data = datasets.load_dataset(hub_id, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; all mean that the data cannot be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"neither a local path nor a data set that can be had from the hub: {reason}", where=name
        ) from error
    return [Row(row, f"{name} row {i}") for i, row in enumerate(data, 1)]


def _missing(package: str, what: str) -> DataError:
    return DataError(f"{what} needs the package {package}", fix="pip install 'lora-ft[data]'")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _txt,
    ".parquet": _arrow, ".arrow": _arrow,
}  # fmt: skip
