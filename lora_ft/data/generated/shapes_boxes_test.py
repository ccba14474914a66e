"""builtin:shapes-boxes-test."""

from pathlib import Path

from ._shapes import write_boxes

VERSION = "1"


def write(folder: Path) -> None:
    """60 pictures."""
    write_boxes(folder, number=60, seed=2)
