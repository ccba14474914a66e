"""builtin:keywords-test."""

from pathlib import Path

from ._keywords import write_keywords

VERSION = "1"
DESCRIPTION = "60 further recordings of the six words of builtin:keywords-train."


def write(folder: Path) -> None:
    """10 of each word."""
    write_keywords(folder, 1, 10)
