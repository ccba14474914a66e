"""The cache folder: what was downloaded, converted or generated once."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from .errors import ResourceError


def cache_dir() -> Path:
    """$LORA_FT_CACHE, or lora-ft below the user's cache folder."""
    if "LORA_FT_CACHE" in os.environ:
        return Path(os.environ["LORA_FT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or (Path(os.environ["HOME"]) / ".cache" if "HOME" in os.environ else None)
    return Path(base or tempfile.gettempdir()) / "lora-ft"


def cached(area: str, key: str, fill: Callable[[Path], bool]) -> Path:
    """The cache folder `area/key`, filled first when it is not there; two processes never fill it at once.

    Args:
        area: such as models.
        key: what it holds, with a version.
        fill: writes into an empty folder; False when it could not, and then nothing is kept.

    Raises:
        ResourceError: the cache cannot be written.
    """
    root = cache_dir() / area
    final = root / key
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            if final.is_dir():
                return final
            with tempfile.TemporaryDirectory(dir=root, prefix=".tmp-") as folder:
                staged = Path(folder) / key
                staged.mkdir()
                if fill(staged):
                    shutil.rmtree(final, ignore_errors=True)
                    staged.rename(final)
    except OSError as error:
        raise ResourceError(
            f"the cache cannot be written: {error.strerror or error}",
            where=str(root),
            fix="set LORA_FT_CACHE to a folder with space",
        ) from error
    return final
