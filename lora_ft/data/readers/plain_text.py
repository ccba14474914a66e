"""Plain text."""

from collections.abc import Iterator
from pathlib import Path

from lora_ft.data._row import Row, text_of_file

SUFFIXES = (".txt",)


def read(path: Path) -> Iterator[Row]:
    """Documents parted by blank lines; a file without blank lines is one document a line."""
    text = text_of_file(path)
    blank = "\n\n" in text.replace("\r\n", "\n").strip()
    start = 1
    for part in text.replace("\r\n", "\n").split("\n\n" if blank else "\n"):
        if part.strip():
            yield Row({"text": part.strip("\n")}, f"{path}:{start + len(part) - len(part.lstrip(chr(10)))}")
        start += part.count("\n") + (2 if blank else 1)
