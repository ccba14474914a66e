"""builtin:digits-rotated-train: digits that lie on their side."""

from pathlib import Path
from typing import Any

from ._digits import write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """The images of digits-train, turned by 90 degrees."""

    def turned(image: Any) -> Any:
        return image.rotate(90)

    write_digits(folder, test=False, change=turned)
