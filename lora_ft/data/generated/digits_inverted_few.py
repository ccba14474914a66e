"""builtin:digits-inverted-few: few dark digits on light paper."""

from pathlib import Path

from ._digits import inverted, write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """Every fourth image of digits-inverted-train."""
    write_digits(folder, test=False, change=inverted, every=4)
