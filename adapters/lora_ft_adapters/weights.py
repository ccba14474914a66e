"""Tensors by name that are read, or computed, one at a time, so that a model never has to be in memory."""

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import AdapterError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WHOLE = "model.safetensors"  # which Transformers reads first, whatever lies beside it
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library allows


class Weights(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for; what they are like is known without making them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""

    def __contains__(self, name: object) -> bool:
        """Without making the tensor, as a mapping's own way would."""
        try:
            self.shape(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    def values_at(self, name: str, index: Tensor) -> Tensor:
        """Some numbers of one tensor, by their places in it laid flat."""
        return self[name].flatten()[index]

    def numbers(self, name: str) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape(name))


class StateWeights(Weights):
    """Tensors that are in memory."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._state[name].dtype


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its file, first byte, size in bytes, dtype and shape."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFolder(Weights):
    """The tensors of a folder of safetensors files by name, each read when it is asked for.

    They are read, not mapped: a mapped file would count as memory of the process once it was read through.

    Raises:
        AdapterError: no safetensors files, an unreadable one, or an index that names a file outside the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        wanted = self._index()
        self._places: dict[str, Place] = {}
        for path in self._paths(wanted):
            found = read_header(path)
            twice = found.keys() & self._places.keys()
            if twice and wanted is None:
                raise AdapterError(f"{self.folder}: {min(twice)} is in {path.name} and in another file")
            self._places |= found
        if wanted is not None:
            lost = [n for n, path in wanted.items() if n not in self._places or self._places[n].path != path]
            if lost:
                raise AdapterError(f"{self.folder}: the index names {lost[0]}, which is not in its file")
        if not self._places:
            raise AdapterError(f"{folder} has no safetensors files")

    def __getitem__(self, name: str) -> Tensor:
        return read_place(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._places[name].dtype

    def values_at(self, name: str, index: Tensor) -> Tensor:
        """Read from their places alone."""
        place = self._places[name]
        width = place.dtype.itemsize
        with place.path.open("rb", buffering=0) as file:
            found = bytearray()
            for i in index.tolist():
                file.seek(place.start + i * width)
                found += file.read(width)
        return torch.frombuffer(found, dtype=place.dtype) if found else torch.empty(0, dtype=place.dtype)

    def _index(self) -> dict[str, Path] | None:
        """File of each tensor; None where one file has them all, or files that no index names."""
        if (self.folder / WHOLE).is_file():
            return None
        found = sorted(self.folder.glob("*.safetensors.index.json"))
        path = next((p for p in found if p.name == f"{WHOLE}.index.json"), found[0] if len(found) == 1 else None)
        if path is None and found:
            raise AdapterError(f"{self.folder} has {len(found)} indices of weights, and none is {WHOLE}.index.json")
        if path is None:
            return None
        try:
            homes: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{path} is no readable index of weights") from error
        outside = [f for f in set(homes.values()) if Path(f).name != f or not (self.folder / f).is_file()]
        if outside:
            raise AdapterError(f"{path} names {outside[0]!r}, which is no file of its folder")
        return {name: self.folder / file for name, file in homes.items()}

    def _paths(self, wanted: dict[str, Path] | None) -> list[Path]:
        if wanted is not None:
            return sorted(set(wanted.values()))
        whole = self.folder / WHOLE
        return [whole] if whole.is_file() else sorted(self.folder.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file is.

    Raises:
        AdapterError: it is no readable safetensors file, or it ends before its tensors do.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= LONGEST_HEADER:
                raise SafetensorError(f"a header of {length} bytes")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        places = {n: _place(path, 8 + length, e) for n, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise AdapterError(f"{path} is no readable safetensors file: {error}") from error
    end = max((p.start + p.size for p in places.values()), default=0)
    if end > path.stat().st_size:
        raise AdapterError(f"{path} is cut off: it has {path.stat().st_size:,} of {end:,} bytes")
    return places


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, read at once; they share one piece of memory.

    Raises:
        AdapterError: it is no readable safetensors file.
    """
    places = read_header(path)
    start = min((p.start for p in places.values()), default=0)
    end = max((p.start + p.size for p in places.values()), default=0)
    held = read_place(Place(path, start, end - start, torch.uint8, (end - start,)))
    return {n: _seen(held[p.start - start :][: p.size], p) for n, p in places.items()}


def _seen(held: Tensor, place: Place) -> Tensor:
    if held.storage_offset() % place.dtype.itemsize:
        held = held.clone()
    return held.view(place.dtype).reshape(place.shape)


def _place(path: Path, offset: int, entry: Mapping[str, Any]) -> Place:
    dtype = DTYPES[entry["dtype"]]
    start, end = (int(n) for n in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    if start < 0 or any(n < 0 for n in shape) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} does not take {end - start} bytes")
    return Place(path, offset + start, end - start, dtype, shape)


def read_place(place: Place) -> Tensor:
    """The tensor that is there."""
    held = torch.empty(place.size, dtype=torch.uint8)
    with place.path.open("rb", buffering=0) as file:
        file.seek(place.start)
        view, got = memoryview(held.numpy().data), 0
        while got < place.size:
            more = file.readinto(view[got:])
            if not more:
                raise AdapterError(f"{place.path} is cut off")
            got += more
    return held.view(place.dtype).reshape(place.shape)
