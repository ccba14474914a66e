"""Rows of semantic-segmentation."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.task_cases import Case, without


def files(folder: Path) -> None:
    """A bright square somewhere on noise; its mask, with a row of pixels that have no class."""
    rng = np.random.default_rng(0)
    for i in range(36):
        height, width = 24 + 2 * (i % 3), 24
        pixels = rng.integers(0, 90, (height, width, 3))
        mask = np.zeros((height, width))
        top, left = rng.integers(0, 12, 2)
        pixels[top : top + 10, left : left + 10, i % 2] += 150
        mask[top : top + 10, left : left + 10] = 1 + i % 2
        mask[-1] = 255
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"mask-{i}.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "small.png")


CASE = Case(
    row=lambda i: {"image": f"{i}.png", "mask": f"mask-{i}.png"}, unlabelled=without("mask"),
    bad={"image": "0.png", "mask": "small.png"}, model="builtin:tiny-segformer", files=files,
    options={"image_size": 32}, metrics=frozenset({"loss", "mean_iou", "mean_accuracy", "pixel_accuracy"}),
)  # fmt: skip
