"""builtin:digits-inverted-train: dark digits on light paper."""

from pathlib import Path

from ._digits import inverted, write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """The images of digits-train, inverted."""
    write_digits(folder, test=False, change=inverted)
