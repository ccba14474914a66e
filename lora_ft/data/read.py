"""Rows from files (`readers/` has the kinds), a folder of these, a hub id, or `builtin:`.

Every row knows its place, so that an error can say `file:line`.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from lora_ft.cache import cached
from lora_ft.errors import DataError, did_you_mean, nearest

from ._label_names import named
from ._media_folder import has_media, rows_of_folder
from ._row import Row, missing
from .generated import generators
from .readers import readers


def read_rows(source: str) -> list[Row]:
    """All rows of `source`, in order.

    Raises:
        DataError: missing, empty, unreadable, or lines that are not rows (each named).
    """
    builtin = source.startswith("builtin:")
    path = builtin_path(source.removeprefix("builtin:")) if builtin else Path(source).expanduser()
    known = readers()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if path.suffix.lower() in known or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise _not_found(path, source)
    return _read_hub(source)


def _read_folder(path: Path) -> list[Row]:
    """Its data files; a README or LICENSE beside images or sounds is none."""
    known = readers()
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
    if any(p.suffix.lower() != ".txt" for p in found) or (found and not has_media(path)):
        return [row for file in found for row in _read_file(file)]
    rows = rows_of_folder(path)
    if rows is None:
        readable = " ".join(known)
        raise DataError(f"no data file in this folder, and no image or sound; readable: {readable}", where=str(path))
    return rows


def builtin_path(name: str) -> Path:
    """The file or folder of a data set that comes with the package, or is generated."""
    folder = Path(str(files("lora_ft.data") / "builtin"))
    path = folder / f"{name}.jsonl"
    if path.is_file():
        return path
    made = generators()
    if name not in made:
        known = [*(p.stem for p in folder.glob("*.jsonl")), *made]
        raise DataError(f"no built-in data {name!r}; {did_you_mean(name, known)}")

    def fill(target: Path) -> bool:
        made[name].write(target)
        return True

    return cached("data", f"{name}-{made[name].VERSION}", fill)


def _not_found(path: Path, source: str) -> DataError:
    if not path.parent.is_dir():
        return DataError(f"data file not found: the folder {path.parent} does not exist", where=source)
    near = nearest(path.name, [p.name for p in path.parent.iterdir() if p.suffix.lower() in readers()])
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"no file in {path.parent} has a name like it"
    return DataError(f"data file not found; {hint}", where=source)


def _read_file(path: Path) -> list[Row]:
    known = readers()
    reader = known.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"unknown kind of data file {path.suffix!r}; readable: {' '.join(known)}", where=str(path))
    try:
        rows = [replace(row, folder=str(path.parent.resolve())) for row in reader(path)]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not rows:
        raise DataError("the data file has no rows", where=str(path))
    return rows


def _read_hub(name: str) -> list[Row]:
    hub_id, _, split = name.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise missing("datasets", "hub data") from error
    try:
        data = datasets.load_dataset(hub_id, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; all mean that the data cannot be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"neither a local path nor a data set that can be had from the hub: {reason}", where=name
        ) from error
    features = data.features.to_dict() if data.features else {}
    rows = data.with_format("arrow")[:].to_pylist()  # images and sounds as {bytes, path}, which the task decodes
    return [Row(row, f"{name} row {i}") for i, row in enumerate(named(rows, features), 1)]
