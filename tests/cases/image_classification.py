"""Rows of image-classification."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.task_cases import COLOURS, Case, without


def files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(36):
        pixels = rng.integers(0, 90, (20 + i % 3, 24, 3))
        pixels[..., i % 3] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


CASE = Case(
    row=lambda i: {"image": f"{i}.png", "label": COLOURS[i % 3]}, unlabelled=without("label"),
    bad={"image": "none.png", "label": "red"}, model="builtin:tiny-vit", files=files,
    metrics=frozenset({"loss", "accuracy", "f1_macro"}),
)  # fmt: skip
