"""Rows of object-detection."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.task_cases import Case, without


def _boxes(i: int) -> list[list[int]]:
    return [[1 + i % 5, 2, 12, 12], [20, 3 + i % 7, 10, 14]]


def _row(i: int) -> dict[str, Any]:
    objects = {"bbox": _boxes(i), "category": ["red", "green"] if i % 2 else ["green", "green"]}
    return {"image": f"{i}.png", "objects": objects}


def files(folder: Path) -> None:
    """Pictures of three sizes."""
    rng = np.random.default_rng(0)
    for i in range(36):
        pixels = rng.integers(0, 90, (32, 32 + 4 * (i % 3), 3))
        for (x, y, w, h), name in zip(_boxes(i), _row(i)["objects"]["category"], strict=True):
            pixels[y : y + h, x : x + w, int(name == "green")] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


CASE = Case(
    row=_row, unlabelled=without("objects"),
    bad={"image": "0.png", "objects": {"bbox": [[40, 2, 5, 5]], "category": ["red"]}}, model="builtin:tiny-detr",
    files=files, metrics=frozenset({"loss", "map", "map_50", "map_75", "mar_100"}),
)  # fmt: skip
