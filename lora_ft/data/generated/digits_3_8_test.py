"""builtin:digits-3-8-test: threes and eights only."""

from pathlib import Path

from ._digits import write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """The images of 3 and 8 of digits-test."""
    write_digits(folder, test=True, only=(3, 8))
