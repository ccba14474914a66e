"""builtin:shapes-segmentation-train."""

from pathlib import Path

from ._shapes import write_masks

VERSION = "1"


def write(folder: Path) -> None:
    """240 pictures."""
    write_masks(folder, number=240, seed=1)
