"""One image, mask or sound of a row: where it is, never what it shows until it is read."""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lora_ft.errors import nearest


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """A file below the data's folder, or content that the row itself holds.

    Attributes:
        kind: image or audio.
        path: absolute; "" when the content is in memory.
        content: bytes of a file, or an array (image: H x W or H x W x C of uint8; sound: frames, or channels x frames).
        rate: of an array of sound, in Hz.
        key: of the content, 32 hex digits: of a file its path, size and time of change.
    """

    kind: str
    path: str = ""
    content: Any = None
    rate: int = 0
    key: str = ""

    @property
    def shown(self) -> str:
        """For people: the path, or what is in memory."""
        return self.path or f"{self.kind} in the row"

    def open(self) -> BinaryIO:
        """The file, to be read from its start; raises ValueError when it cannot be opened."""
        if not self.path:
            return io.BytesIO(self.content)
        try:
            return Path(self.path).open("rb")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error


def find_media(value: Any, kind: str, root: str) -> Media:
    """The medium that a row's value means.

    Args:
        value: a path from `root` on, the bytes of a file, {"bytes", "path"} or {"array", "sampling_rate"} as Hugging
            Face's columns are, an array, nested lists of numbers, or a PIL image.
        kind: image or audio.
        root: folder that no path may leave, whether through "..", an absolute path or a link.

    Raises:
        ValueError: it is missing, empty, outside of the root, an address, or nothing of this kind.
    """
    if isinstance(value, Mapping):
        return _from_columns(value, kind, root)
    if isinstance(value, str | os.PathLike):
        return _from_path(os.fspath(value), kind, root)
    if isinstance(value, bytes | bytearray):
        return _from_bytes(bytes(value), kind)
    if hasattr(value, "getbands"):
        return _from_picture(value, kind)
    if isinstance(value, list | tuple) or hasattr(value, "dtype"):
        return _from_array(_array(value, kind), kind, 0)
    raise ValueError(f"the {kind} is a {type(value).__name__}; allowed: a path, bytes, an array")


def _from_columns(value: Mapping[str, Any], kind: str, root: str) -> Media:
    if value.get("array") is not None:
        return _from_array(_array(value["array"], kind), kind, _rate(value.get("sampling_rate")))
    if value.get("bytes") is not None:
        return find_media(value["bytes"], kind, root)
    if value.get("path"):
        return find_media(value["path"], kind, root)
    raise ValueError(
        f"the {kind} is an object with {', '.join(map(str, value)) or 'nothing'}; allowed: bytes, path, array"
    )


def _rate(value: Any) -> int:
    try:
        return int(value or 0)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the sampling_rate must be a number of Hz, got {value!r}") from error


def _from_path(text: str, kind: str, root: str) -> Media:
    if "://" in text or text.startswith("data:"):
        raise ValueError(f"{text[:80]}: an address; nothing is downloaded, give a file below {root}")
    base = Path(root or ".").resolve()
    try:
        path = (base / text).resolve()
        stat = path.stat() if path.is_relative_to(base) and path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, a zero byte, no permission
        raise ValueError(f"{text[:80]}: no {kind} can be at such a path: {error!s:.200}") from error
    if not path.is_relative_to(base):
        raise ValueError(
            f"{text}: outside of the data's folder {base}, and no {kind} is read from there; "
            "--set data.media_root=FOLDER"
        )
    if path.is_dir():
        raise ValueError(f"{text}: a folder, not {kind}")
    if stat is None or not path.is_file():
        raise ValueError(f"{text}: no such file below {base}{_hint(path)}")
    if not stat.st_size:
        raise ValueError(f"{text}: the file has 0 bytes; fetch it again, or take the row out")
    key = _digest(f"{path}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return Media(kind, str(path), key=key)


def _hint(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent.name}"
    near = nearest(path.name, [p.name for p in path.parent.iterdir()])
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _from_bytes(content: bytes, kind: str) -> Media:
    if not content:
        raise ValueError(f"the {kind} has 0 bytes")
    return Media(kind, content=content, key=_digest(content))


def _from_picture(image: Any, kind: str) -> Media:
    """A PIL image as the array that holds all of it, or as a PNG file where an array would lose palette or depth."""
    from ._pillow import loaded, pillow

    image = loaded(Media(kind), image)
    if image.mode in ("1", "L", "RGB", "RGBA", "I", "F") and "transparency" not in image.info:
        return _from_array(np.asarray(image), kind, 0)
    if image.mode.startswith("I;16"):
        image = pillow().fromarray(np.asarray(image).astype(np.uint16))
    elif image.mode not in ("P", "LA", "1", "L", "RGB"):
        image = image.convert("RGBA" if image.mode in ("PA", "RGBa", "La") else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return _from_bytes(file.getvalue(), kind)


def _from_array(array: Any, kind: str, rate: int) -> Media:
    if not array.size:
        raise ValueError(f"the {kind} is an empty array of shape {array.shape}")
    array = np.ascontiguousarray(array)
    key = _digest(repr((array.shape, array.dtype.str, rate)).encode() + array.tobytes())
    return Media(kind, content=array, rate=rate, key=key)


def _array(value: Any, kind: str) -> Any:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"the {kind} holds lists of different lengths") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"the {kind} must hold numbers, got {array.dtype}")
    return array


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
