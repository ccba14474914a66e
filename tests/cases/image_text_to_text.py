"""A question about the colour of one or two pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.task_cases import COLOURS, Case, without

SIZES = ((32, 32), (40, 24), (24, 40))


def _row(i: int) -> dict[str, Any]:
    images = [f"{i}.png"] if i % 3 else [f"{i}.png", f"{(i + 1) % 36}.png"]
    return {"images": images, "question": f"{'so ' * (i % 4)}which colour is it", "answer": COLOURS[i % 3]}


def _files(folder: Path) -> None:
    from PIL import Image

    for i in range(36):
        pixels = np.zeros((*SIZES[i % 2], 3), np.uint8)
        pixels[..., i % 3] = 150 + 2 * i
        Image.fromarray(pixels).save(folder / f"{i}.png")


CASE = Case(
    row=_row, unlabelled=without("answer"), files=_files, model="builtin:tiny-vlm",
    bad={"images": ["0.png", "nowhere.png"], "question": "which colour is it", "answer": "red"},
    metrics=frozenset({"loss", "token_accuracy", "perplexity", "exact_match"}),
)  # fmt: skip
