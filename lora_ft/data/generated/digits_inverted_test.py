"""builtin:digits-inverted-test: dark digits on light paper."""

from pathlib import Path

from ._digits import inverted, write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """The images of digits-test, inverted."""
    write_digits(folder, test=True, change=inverted)
