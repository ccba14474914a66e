"""Data sets of images and sounds that are made on the spot, one file each: seeded, the same on every machine.

A file has `VERSION` and `write(folder)`; the set called `builtin:digits-train` is in `digits_train.py`.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def generators() -> dict[str, Any]:
    """The modules by the set's name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {n.replace("_", "-"): importlib.import_module(f"{__name__}.{n}") for n in names}
