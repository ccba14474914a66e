"""scikit-learn's handwritten digits (Alpaydin and Kaynak 1998; 8 x 8 pixels of 43 people) as class folders of PNG."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 32  # pixels of a side
TEST = 3  # every so-manieth image is for testing
Change = Callable[[Any], Any]


def digits(test: bool) -> tuple[Any, Any]:
    """(images of uint8 (N, 8, 8), their digits) of one of two sets that share no image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % TEST == 0) == test
    return (data.images[chosen] * 255 / 16).round().astype(np.uint8), data.target[chosen]


def write_digits(
    folder: Path, test: bool, change: Change = lambda image: image, every: int = 1, only: tuple[int, ...] = ()
) -> None:
    """Write FOLDER/DIGIT/NUMBER.png, enlarged to 32 x 32.

    Args:
        folder: empty.
        test: which set.
        change: what is done to a PIL image.
        every: write one of so many.
        only: these digits; () for all.
    """
    from PIL import Image

    chosen = [(p, d) for p, d in zip(*digits(test), strict=True) if not only or d in only]
    for number, (pixels, digit) in enumerate(chosen):
        if number % every:
            continue
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB")
        place = folder / str(digit)
        place.mkdir(exist_ok=True)
        change(image).save(place / f"{number:04d}.png")


def inverted(image: Any) -> Any:
    """Dark on light."""
    from PIL import ImageOps

    return ImageOps.invert(image)
