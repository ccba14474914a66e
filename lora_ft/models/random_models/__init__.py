"""Tiny models with random weights, one file each: presets and recipes can be tried with them in seconds, offline.

A file has `VERSION`, `DESCRIPTION` and `build(folder)`, which writes model and processor in Transformers' layout; the
model called `builtin:tiny-bert` is in `tiny_bert.py`.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def builders() -> dict[str, Any]:
    """The modules by the model's name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {n.replace("_", "-"): importlib.import_module(f"{__name__}.{n}") for n in names}
