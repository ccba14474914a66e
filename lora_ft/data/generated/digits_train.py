"""builtin:digits-train: two thirds of scikit-learn's digits, 32 x 32."""

from pathlib import Path

from ._digits import write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """1,198 images in 10 class folders."""
    write_digits(folder, test=False)
