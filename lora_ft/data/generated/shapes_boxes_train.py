"""builtin:shapes-boxes-train."""

from pathlib import Path

from ._shapes import write_boxes

VERSION = "1"


def write(folder: Path) -> None:
    """240 pictures."""
    write_boxes(folder, number=240, seed=1)
