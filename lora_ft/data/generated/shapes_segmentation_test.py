"""builtin:shapes-segmentation-test."""

from pathlib import Path

from ._shapes import write_masks

VERSION = "1"


def write(folder: Path) -> None:
    """60 pictures."""
    write_masks(folder, number=60, seed=2)
