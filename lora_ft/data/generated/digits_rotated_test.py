"""builtin:digits-rotated-test: digits that lie on their side."""

from pathlib import Path
from typing import Any

from ._digits import write_digits

VERSION = "1"


def write(folder: Path) -> None:
    """The images of digits-test, turned by 90 degrees."""

    def turned(image: Any) -> Any:
        return image.rotate(90)

    write_digits(folder, test=True, change=turned)
