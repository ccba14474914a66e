"""A `CASE` for each task of images and sounds, in a file of the task's name."""

import importlib
import pkgutil

CASES = {
    m.name.replace("_", "-"): importlib.import_module(f"{__name__}.{m.name}").CASE
    for m in pkgutil.iter_modules(__path__)
}
