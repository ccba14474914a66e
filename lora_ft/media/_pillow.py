"""Pillow, asked for what is safe to read in threads: known formats, no decoding before the size is known."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_ft.errors import UsageError

from ._ref import Media

# What decodes inside Pillow: no EPS (runs Ghostscript), no ICO (decodes on opening). TGA has no mark, so it is last.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "TGA")
READABLE = "PNG, JPEG, GIF, WebP, TIFF, BMP, AVIF, JPEG 2000, PPM, TGA"
ORIENTATION = 0x0112  # tag of EXIF


def pillow() -> Any:
    """PIL.Image.

    Raises:
        UsageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("images need the package Pillow", fix="pip install 'lora-ft[vision]'") from error
    Image.init()
    return Image


@contextmanager
def opened(media: Media) -> Iterator[Any]:
    """The image with its header read and no pixel decoded.

    `Image.open` would warn about large sizes, and a warning can be silenced for all threads only; callers check sizes.

    Raises:
        ValueError: no image, or its header is damaged.
    """
    formats = pillow().OPEN
    with media.open() as file:
        start, damage = file.read(16), ""
        for name in FORMATS:
            factory, accept = formats.get(name, (None, None))
            if factory is None or not _marked(accept, start):
                continue
            file.seek(0)
            try:
                image = factory(file, "")
            except Exception as error:  # each format raises what its parser stumbles over
                damage = damage or (f"a damaged {name} image: {error}" if accept else "")
                continue
            yield image
            return
        raise ValueError(
            f"{media.shown}: "
            + (damage or f"no image that can be read (starts with {start[:8]!r}); allowed: {READABLE}")
        )


def _marked(accept: Any, start: bytes) -> bool:
    """Whether a file that starts so says that it is of a format; an answer in words is the lack of a library."""
    try:
        found = accept is None or accept(start)
    except (IndexError, struct.error):
        return False
    return bool(found) and not isinstance(found, str)


def orientation(image: Any) -> int:
    """1 to 8 as EXIF counts, known without decoding; 1 where EXIF is missing or damaged, as viewers do."""
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode the pixels in search of it
        return 1
    if image.format == "TIFF":  # Pillow turns it itself
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever the parser of the tags stumbles over
        return 1


def turned(image: Any, how: int) -> Any:
    """The image as its EXIF orientation means it."""
    turns = pillow().Transpose
    steps = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }  # fmt: skip
    return image.transpose(steps[how]) if how in steps else image


def loaded(media: Media, image: Any) -> Any:
    """The image, decoded whole and turned as it is meant.

    Raises:
        ValueError: damaged or cut short.
    """
    how = orientation(image)
    try:
        image.load()
    except Exception as error:  # each format raises what its decoder stumbles over
        raise ValueError(
            f"{media.shown}: a damaged or truncated image: {error}; make the file anew, or take the row out"
        ) from error
    return turned(image, how)
