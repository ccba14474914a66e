"""builtin:keywords-train."""

from pathlib import Path

from ._keywords import write_keywords

VERSION = "1"
DESCRIPTION = "150 recordings of six made-up words, 0.6 s at 16 kHz each, in class folders."


def write(folder: Path) -> None:
    """25 of each word."""
    write_keywords(folder, 0, 25)
