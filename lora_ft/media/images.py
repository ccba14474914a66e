"""Images and masks, read whole or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._pillow import loaded, opened, orientation, pillow
from ._ref import Media

MAX_PIXELS = 50_000_000
MASK_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
TILED = (322, 323)  # tags of TIFF: width and height of a tile, which may be larger than the image


def image_size(media: Media) -> tuple[int, int]:
    """(width, height), from the header alone, as it will be after turning.

    Raises:
        ValueError: it is no image.
    """
    if isinstance(media.content, np.ndarray):
        height, width = _channels_last(media).shape[:2]
        return width, height
    with opened(media) as image:
        width, height = image.size
        across = orientation(image) in (5, 6, 7, 8)
    return (height, width) if across else (width, height)


def read_image(media: Media, max_pixels: int | None = MAX_PIXELS) -> Any:
    """The image as a PIL image in RGB: turned as its EXIF says, on white where it is transparent, its first frame.

    Args:
        media: which.
        max_pixels: a larger one is refused before anything of it is decoded.

    Raises:
        ValueError: corrupt, cut short, too large, or no image.
    """
    if isinstance(media.content, np.ndarray):
        array = _channels_last(media)
        _check_size(media, (array.shape[1], array.shape[0]), max_pixels)
        return _rgb(media, pillow().fromarray(_bytes(media, array)))
    with opened(media) as image:
        _check_header(media, image, max_pixels)
        return _rgb(media, loaded(media, image))


def read_mask(media: Media, max_pixels: int | None = MAX_PIXELS) -> NDArray[np.int64]:
    """Class ids (H, W) as the file has them: palette indices, grey values, 16-bit numbers.

    Raises:
        ValueError: as `read_image`, or the file holds colours, or is of a format that does not keep numbers.
    """
    if isinstance(media.content, np.ndarray):
        return _ids(media, media.content, max_pixels)
    with opened(media) as image:
        _check_header(media, image, max_pixels)
        if image.mode not in MASK_MODES:
            raise ValueError(
                f"{media.shown}: a mask of colours ({image.mode}); each pixel must be the number of its class "
                "(modes P, L, I;16)"
            )
        if image.format in ("JPEG", "MPO"):
            raise ValueError(f"{media.shown}: JPEG changes the numbers of a mask's classes; save the mask as PNG")
        stored, shown = _levels(image)
        array = np.asarray(loaded(media, image)).astype(np.int64)
    return array if stored == shown else np.rint(array * (stored / shown)).astype(np.int64)


def write_mask(path: Path, mask: Any) -> None:
    """Class ids (H, W) as a PNG file of 8 bits, or of 16 where an id is over 255."""
    array = np.asarray(mask)
    pillow().fromarray(array.astype(np.uint8 if array.max(initial=0) < 256 else np.uint16)).save(path)


def _levels(image: Any) -> tuple[int, int]:
    """(largest number in the file, what Pillow stretches it to): grey of 2 or 4 bits, and PGM files that say."""
    decoder, _, _, args = image.tile[0] if image.tile else ("", None, 0, ())
    args = args if isinstance(args, tuple) else (args,)
    if decoder.startswith("ppm"):
        return int(args[-1]), 255 if image.mode == "L" else 65535
    raw = str(args[0]) if args else ""
    return next(((top, 255) for bits, top in (("L;2", 3), ("L;4", 15)) if raw.startswith(bits)), (1, 1))


def _check_header(media: Media, image: Any, max_pixels: int | None) -> None:
    _check_size(media, image.size, max_pixels)
    tile = tuple(int(getattr(image, "tag_v2", {}).get(tag, 1)) for tag in TILED)
    if max_pixels is not None and tile[0] * tile[1] > max(max_pixels, 2**16):
        raise ValueError(f"{media.shown}: a TIFF file with tiles of {tile[0]} x {tile[1]} pixels; data.max_pixels")


def _check_size(media: Media, size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if not width * height:
        raise ValueError(f"{media.shown}: an image of {width} x {height} pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{media.shown}: {width} x {height} = {width * height:,} pixels, allowed {max_pixels:,}; "
            "make it smaller, or raise data.max_pixels"
        )


def _ids(media: Media, array: NDArray[Any], max_pixels: int | None) -> NDArray[np.int64]:
    if array.ndim != 2:
        raise ValueError(f"{media.shown}: a mask has 2 dimensions, got {array.ndim}")
    _check_size(media, (array.shape[1], array.shape[0]), max_pixels)
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise ValueError(f"{media.shown}: a mask holds numbers of classes, got fractions or NaN")
    return array.astype(np.int64)


def _rgb(media: Media, image: Any) -> Any:
    kind = pillow()
    if image.mode.startswith("I"):  # 16 bits: to the range of 8
        array = np.asarray(image).astype(np.float64)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"{media.shown}: grey values from {array.min():g} to {array.max():g}; allowed: 16 bits, 0 to 65535"
            )
        return kind.fromarray((array / 257.0).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return kind.fromarray(_bytes(media, np.asarray(image))).convert("RGB")
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = kind.new("RGBA", image.size, (255, 255, 255, 255))
            image = kind.alpha_composite(white, image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{media.shown}: an image of mode {image.mode}: {error}; save it as RGB") from error


def _channels_last(media: Media) -> NDArray[Any]:
    """A view (H, W) or (H, W, C) of an array that may have its channels first."""
    array = media.content
    first, last = array.shape[0], array.shape[-1]
    if array.ndim == 3 and last not in (1, 3, 4) and (first in (1, 3) or (first == 4 and last > 4)):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4)):
        raise ValueError(
            f"an image has the shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, got {media.content.shape}"
        )
    return np.asarray(array)


def _bytes(media: Media, array: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers from 0 to 255; floats up to 1 and booleans are shares of 255."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{media.shown}: the image holds NaN or infinity")
    if low < 0 or high > 255:
        raise ValueError(
            f"{media.shown}: the image holds numbers from {low:g} to {high:g}; allowed: 0 to 255, or 0 to 1"
        )
    scale = 255.0 if array.dtype.kind == "b" or (array.dtype.kind == "f" and high <= 1) else 1.0
    return np.ascontiguousarray((array * scale).round().astype(np.uint8))
