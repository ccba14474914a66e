"""builtin:patterns-train: ten kinds of coloured patterns."""

from pathlib import Path

from ._patterns import write_patterns

VERSION = "1"


def write(folder: Path) -> None:
    """24 images of 64 x 64 in each of 10 class folders."""
    write_patterns(folder, of_each=24, seed=1)
