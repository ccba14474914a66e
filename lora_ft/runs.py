"""The run directory: created once, locked while in use, never mixed with another run, never deleted."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import ArtifactError, ResourceError, UsageError

STATUS_DONE = "completed"
LOCKS = (".lock", ".lock.json")
ATTEMPT = ("run.json", "recipe.resolved.yaml", "checkpoints", "answers-before.jsonl")


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: the directory.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def of(cls, given: Run | str | Path) -> Run:
        """A run, or the run in a folder, or the one whose adapter's folder is given."""
        if isinstance(given, Run):
            return given
        found = cls(Path(given))
        above = cls(found.path.absolute().parent)
        inside = found.path.name == above.adapter.name and (above.path / "run.json").is_file()
        return above if inside and not (found.path / "run.json").is_file() else found

    @property
    def recipe(self) -> Path:
        """The file of its recipe.

        Raises:
            ArtifactError: it is gone.
        """
        path = self.path / "recipe.resolved.yaml"
        if not path.is_file():
            raise ArtifactError("the run's recipe is gone", where=str(path), fix="copy the whole run again")
        return path

    @property
    def adapter(self) -> Path:
        """Folder of the final adapter, in PEFT's layout with the tokenizer beside it."""
        return self.path / "adapter"

    @property
    def final(self) -> Run:
        """The run of the last stage; of a run without stages, itself."""
        last = self.facts.get("final")
        return Run(self.path / last) if last else self

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says: status, base, task, metrics, counts, versions."""
        try:
            facts: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                "there is no such folder"
                if not self.path.exists()
                else "this is not a run directory: run.json is missing or unreadable",
                where=str(self.path),
                fix="give the folder that `lora-ft train` printed",
            ) from error
        return facts

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """`before` and `after` metrics on the held-out rows."""
        found: dict[str, dict[str, float]] = self.facts.get("metrics", {})
        return found

    def update(self, values: Mapping[str, Any]) -> None:
        """Merge `values` into run.json, replacing the file in one step."""
        path = self.path / "run.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_text(path, json.dumps({**old, **values}, indent=2, default=str) + "\n")

    def trim_log(self, step: int) -> None:
        """Drop the records of steps after `step`, which a resumed run will do again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
            write_text(path, "".join(f"{line}\n" for line in lines))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never half of it."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)


def make_readable(folder: Path) -> None:
    """Give the files of a published folder the mode of any new file; safetensors writes them for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def default_path(name: str) -> Path:
    """runs/<name>-<date>-<time>."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def create(path: Path, *, overwrite: bool = False) -> Run:
    """Make a new run directory.

    Raises:
        UsageError: it exists and is not empty; `overwrite` moves it aside as `.bak-<time>` instead.
        ResourceError: it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise UsageError("the output path is a file", where=str(path), fix="--out ANOTHER_DIR")
    if path.is_dir() and _trained_nothing(path):
        with locked(Run(path)):
            for left in path.iterdir():
                if left.is_file() and left.name not in LOCKS:
                    left.unlink()
    if path.is_dir() and any(p.name not in (*LOCKS, "checkpoints") for p in path.iterdir()):
        if not overwrite:
            raise UsageError(
                f"the output directory is in use{_what_is_there(path)}",
                where=str(path),
                fix="--out ANOTHER_DIR, --resume to go on with it, or --overwrite to move it aside",
            )
        with locked(Run(path)):
            pass  # refuses when another process is training there
        path.rename(path.with_name(f"{path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(f"the output directory cannot be written: {error.strerror}", where=str(path)) from error
    return Run(path)


def _trained_nothing(path: Path) -> bool:
    """Whether this is only what a run leaves that failed before its first checkpoint, so that nobody misses it."""
    names = {p.name for p in path.iterdir()}
    checkpoints = path / "checkpoints"
    empty = not checkpoints.is_dir() or not any(checkpoints.iterdir())
    return "run.json" in names and names <= {*LOCKS, *ATTEMPT} and empty


def _what_is_there(path: Path) -> str:
    try:
        return f": a run with status {Run(path).facts.get('status', 'unknown')!r}"
    except ArtifactError:
        return " by other files"


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the directory for this process; the operating system frees the lock when a process dies.

    Raises:
        ResourceError: another process holds it; names that process.
    """
    holder = run.path / ".lock.json"
    lock = FileLock(run.path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "unknown"
        raise ResourceError(f"another process is using this run directory: {who}", where=str(run.path)) from error
    except OSError as error:
        raise ResourceError(f"the run directory cannot be locked: {error.strerror}", where=str(run.path)) from error
    try:
        write_text(holder, f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
