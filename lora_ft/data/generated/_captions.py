"""One coloured shape on grey, with a caption that names both."""

import json
from pathlib import Path

import numpy as np

from ._shapes import CLASSES, Pixels, shape_of

COLOURS = {
    "red": (200, 30, 30), "green": (30, 150, 40), "blue": (40, 60, 200), "black": (5, 5, 5),
}  # fmt: skip
SIZES = (40, 48, 56)  # pixels that a side of a picture may have


def write_captions(folder: Path, seed: int, rows: int) -> None:
    """Pictures, and metadata.jsonl with the columns image and caption."""
    from PIL import Image

    lines = []
    for row in range(rows):
        pixels, caption = _picture(np.random.default_rng([seed, row]))
        name = f"{row:04}.png"
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"image": name, "caption": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _picture(rng: np.random.Generator) -> tuple[Pixels, str]:
    """One shape on light grey, at least two thirds as large as the picture."""
    height, width = (int(x) for x in rng.choice(SIZES, size=2))
    pixels = np.full((height, width, 3), rng.integers(200, 256), np.uint8)
    most = min(height, width)
    side = int(rng.integers(2 * most // 3, most))
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    colour, kind = str(rng.choice(list(COLOURS))), str(rng.choice(CLASSES))
    pixels[top : top + side, left : left + side][shape_of(kind, side)] = COLOURS[colour]
    return pixels, f"a {colour} {kind}"
