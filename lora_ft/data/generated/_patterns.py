"""Ten kinds of coloured patterns: five colours, each as stripes or as a checkerboard, with noise."""

from pathlib import Path

import numpy as np

SIZE = 64
COLOURS = {"blue": (40, 70, 220), "green": (40, 180, 70), "grey": (128, 128, 128), "red": (220, 50, 40),
           "yellow": (230, 210, 40)}  # fmt: skip
KINDS = ("checks", "stripes")


def write_patterns(folder: Path, of_each: int, seed: int) -> None:
    """Write FOLDER/COLOUR-KIND/NUMBER.png.

    Args:
        folder: empty.
        of_each: images of each class.
        seed: of widths, angles and noise.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    for colour, kind in ((c, k) for c in COLOURS for k in KINDS):
        place = folder / f"{colour}-{kind}"
        place.mkdir()
        for number in range(of_each):
            width, angle = rng.uniform(6, 12), rng.uniform(0, np.pi)
            along = (x * np.cos(angle) + y * np.sin(angle)) // width
            across = (y * np.cos(angle) - x * np.sin(angle)) // width
            on = (along + (across if kind == "checks" else 0)) % 2 == 0
            pixels = np.where(on[..., None], np.array(COLOURS[colour]), 20) + rng.normal(0, 12, (SIZE, SIZE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:03d}.png")
