"""Whether a value or a file is an image or a sound, without opening it."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

IMAGE, AUDIO = "image", "audio"
SUFFIXES = {
    IMAGE: (
        ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm",
        ".pbm", ".pnm", ".tga", ".jp2", ".j2k",
    ),
    AUDIO: (
        ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64",
        ".rf64",
    ),
}  # fmt: skip
SOUND_STARTS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"caff", b"\xff\xfb", b"\xff\xf3")


def kind_of_file(name: str) -> str:
    """Image, audio, or "" by the name's suffix."""
    suffix = PurePath(name).suffix.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), "")


def kind_of(value: Any) -> str:
    """Image, audio, or "" for a path, the bytes of a file, a column of Hugging Face's, an array, or a PIL image."""
    if isinstance(value, str):
        return kind_of_file(value)
    if isinstance(value, bytes):
        return _kind_of_bytes(value)
    if isinstance(value, Mapping):
        return AUDIO if "array" in value else kind_of(value.get("path")) or kind_of(value.get("bytes"))
    if hasattr(value, "getbands"):
        return IMAGE
    return {1: AUDIO, 2: IMAGE, 3: IMAGE}.get(_dimensions(value), "")


def _kind_of_bytes(content: bytes) -> str:
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return IMAGE
    return AUDIO if content.startswith(SOUND_STARTS) else IMAGE


def _dimensions(value: Any) -> int:
    """Of an array, or of nested lists of numbers; 0 for all else."""
    if hasattr(value, "ndim"):
        return int(value.ndim)
    depth = 0
    while isinstance(value, list | tuple) and value:
        depth, value = depth + 1, value[0]
    return depth if isinstance(value, int | float) else 0
