"""Decoded images and sounds on disk, under a budget: what was used longest ago goes first."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lora_ft.cache import cache_dir

ROOM = 0.9  # share of the budget that is left in use when it was passed, so that not every write prunes
SHARED = 1 / 8  # share of the budget that is written before looking at what other processes wrote
STALE_S = 3600  # a staged file this old belongs to a process that was killed
STAGED = ".tmp-"


class Cache:
    """NumPy files without pickle; several threads and processes may share one.

    Args:
        folder: made when something is kept.
        budget_bytes: 0 switches the cache off.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder, self.budget = folder, budget_bytes
        self._lock = threading.Lock()
        self._free = 0.0  # bytes that may be written before the next look at the folder
        if budget_bytes:
            self._prune(budget_bytes)

    def get(self, key: str) -> Any:
        """The array, or None; a damaged file is dropped."""
        if not self.budget:
            return None
        path = self._path(key)
        try:
            with path.open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except FileNotFoundError:
            return None
        except Exception:  # NumPy's reader of headers raises what its parser stumbles over
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # another process may have dropped it
            os.utime(path)
        return array

    def put(self, key: str, array: Any) -> None:
        """Keep the array; a full disk only means that it is not kept."""
        if not self.budget or array.nbytes > self.budget * ROOM:
            return
        with self._lock:
            self._free -= array.nbytes
            if self._free < 0:
                self._prune(int(self.budget * ROOM) - array.nbytes)
                self._free -= array.nbytes
        with contextlib.suppress(OSError):
            self._write(self._path(key), array)

    def through(self, key: str, make: Callable[[], Any]) -> Any:
        """The array under `key`, made and kept when it is not there."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"

    def _write(self, path: Path, array: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, staged = tempfile.mkstemp(dir=path.parent, prefix=STAGED)
        try:
            with open(number, "wb") as file:
                np.save(file, array, allow_pickle=False)
            Path(staged).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(staged).unlink(missing_ok=True)
            raise

    def _prune(self, most: int) -> None:
        """Drop what was used longest ago until `most` bytes are left, and staged files that nobody finishes."""
        files = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                if path.name.startswith(STAGED):
                    if stat.st_mtime < time.time() - STALE_S:
                        path.unlink(missing_ok=True)
                elif path.suffix == ".npy":
                    files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files, key=lambda f: f[0]):
            if total <= most:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                total -= size
        self._free = min(self.budget - total, self.budget * SHARED)


_open: dict[str, Cache] = {}


def shared() -> Cache:
    """The cache of this process; off until `use` has given it a budget."""
    return _open.get("cache") or Cache(cache_dir() / "media", 0)


def use(budget_bytes: int) -> None:
    """Give the process's cache a budget."""
    _open["cache"] = Cache(cache_dir() / "media", budget_bytes)
