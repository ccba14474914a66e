"""builtin:digits-test: the other third of scikit-learn's digits."""

from pathlib import Path

from ._digits import write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """599 images in 10 class folders."""
    write_digits(folder, test=True)
