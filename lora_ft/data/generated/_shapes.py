"""Circles, squares and triangles on noise: pictures of them, masks and boxes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ("circle", "square", "triangle")
SIZES = (48, 56, 64)  # pixels that a side of a picture may have
SMALLEST, LARGEST = 14, 26  # pixels of a shape's side
MOST = 3  # shapes in a picture
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        pixels: (height, width, 3).
        mask: (height, width); 0 is background, 1 and up the classes.
        boxes: [x, y, width, height] of each shape, in pixels.
        classes: of each shape, from 1.
    """

    pixels: Pixels
    mask: Pixels
    boxes: tuple[tuple[int, int, int, int], ...]
    classes: tuple[int, ...]


def pictures(number: int, seed: int) -> Iterator[Picture]:
    """The same pictures for the same seed; no two shapes of one touch."""
    for index in range(number):
        yield _picture(np.random.default_rng([seed, index]))


def _picture(rng: np.random.Generator) -> Picture:
    height, width = (int(x) for x in rng.choice(SIZES, size=2))
    pixels = rng.integers(0, 96, size=(height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    for _ in range(int(rng.integers(1, MOST + 1))):
        side = int(rng.integers(SMALLEST, LARGEST + 1))
        left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
        kind = int(rng.integers(1, len(CLASSES) + 1))
        colour = rng.integers(128, 256, size=3, dtype=np.uint8)
        around = mask[max(0, top - 2) : top + side + 2, max(0, left - 2) : left + side + 2]
        if around.any():
            continue
        inside = shape_of(CLASSES[kind - 1], side)
        pixels[top : top + side, left : left + side][inside] = colour
        mask[top : top + side, left : left + side][inside] = kind
        boxes.append((left, top, side, side))
        classes.append(kind)
    return Picture(pixels, mask, tuple(boxes), tuple(classes))


def shape_of(name: str, side: int) -> NDArray[np.bool_]:
    """(side, side), touching all four borders; integers only, so that it is the same everywhere."""
    y, x = np.mgrid[0:side, 0:side]
    if name == "square":
        return np.ones((side, side), np.bool_)
    if name == "circle":
        inside: NDArray[np.bool_] = (2 * x + 1 - side) ** 2 + (2 * y + 1 - side) ** 2 <= side**2
        return inside
    below: NDArray[np.bool_] = abs(2 * x + 1 - side) <= y + 1  # apex at the top, as wide as its box at the bottom
    return below


def write_masks(folder: Path, *, number: int, seed: int) -> None:
    """images/0000.png and masks/0000.png of `number` pictures."""
    for name, picture in _numbered(folder, number, seed):
        _write(folder / "masks" / name, picture.mask)


def write_boxes(folder: Path, *, number: int, seed: int) -> None:
    """images/0000.png of `number` pictures, and annotations.json in COCO's layout."""
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for name, picture in _numbered(folder, number, seed):
        height, width = picture.mask.shape
        images.append({"id": len(images) + 1, "file_name": f"images/{name}", "height": height, "width": width})
        for box, kind in zip(picture.boxes, picture.classes, strict=True):
            row: dict[str, Any] = {"id": len(boxes) + 1, "image_id": len(images), "category_id": kind}
            boxes.append(row | {"bbox": list(box), "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))


def _numbered(folder: Path, number: int, seed: int) -> Iterator[tuple[str, Picture]]:
    """The file name and content of each picture, which is written below images/."""
    for index, picture in enumerate(pictures(number, seed)):
        name = f"{index:04d}.png"
        _write(folder / "images" / name, picture.pixels)
        yield name, picture


def _write(path: Path, pixels: Pixels) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
