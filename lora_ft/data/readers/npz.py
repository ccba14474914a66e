"""NumPy archives: arrays of the same first dimension, which is the rows."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_ft.data._row import Row
from lora_ft.errors import DataError

SUFFIXES = (".npz",)


def read(path: Path) -> Iterator[Row]:
    """A row for each index of the first dimension: the arrays' parts by name."""
    arrays = _arrays(path)
    scalar = [k for k, a in arrays.items() if a.ndim == 0]
    if scalar:
        raise DataError(f"the array {scalar[0]!r} is a single number; the first dimension is the rows", where=str(path))
    lengths = {k: len(a) for k, a in arrays.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{k} {n}" for k, n in lengths.items())
        raise DataError(f"the arrays have different numbers of rows: {shown}", where=str(path))
    names = tuple(arrays)
    for number, values in enumerate(zip(*arrays.values(), strict=True), 1):
        yield Row(dict(zip(names, values, strict=True)), f"{path} row {number}")


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    if not zipfile.is_zipfile(path):
        raise DataError("not a NumPy archive", where=str(path), fix="np.savez(path, x=x, y=y)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        pickled = "Object arrays" in str(error)
        raise DataError(
            "holds Python objects, which are never loaded" if pickled else f"damaged NumPy archive: {error}",
            where=str(path),
            fix="save numbers only: np.savez(path, x=x, y=y)",
        ) from error
