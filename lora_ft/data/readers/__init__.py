"""One file per kind of data file: its `SUFFIXES`, and `read(path)`, which yields its rows."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from lora_ft.data._row import Row

Reader = Callable[[Path], Iterator[Row]]


@cache
def readers() -> dict[str, Reader]:
    """The reader for each suffix."""
    found: dict[str, Reader] = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        if not name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{name}")
            found |= dict.fromkeys(module.SUFFIXES, module.read)
    return found
