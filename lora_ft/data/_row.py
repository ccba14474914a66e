"""A row and its place, and what the readers of files share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import DataError

MAX_PROBLEMS = 50  # stop reading a file that is not what its name says


@dataclass(frozen=True, slots=True)
class Row:
    """Values by column, where they stand, and the folder that paths in them start from."""

    values: Mapping[str, Any]
    where: str
    folder: str = ""


def text_of_file(path: Path) -> str:
    """The file as text; raises DataError with the line of what is not UTF-8, or of a NUL character."""
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


def missing(package: str, what: str) -> DataError:
    """The error for a package of the extra `data` that is not there."""
    return DataError(f"{what} needs the package {package}", fix="pip install 'lora-ft[data]'")
