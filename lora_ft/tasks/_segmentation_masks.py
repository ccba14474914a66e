"""Masks as files hold them, and as models take them: the n-th class is n, pixels without a class are VOID."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.media import Media, find_media, image_size, read_mask
from lora_ft.media.image_augment import ImageAugment, augment_with
from lora_ft.records import Example, Sample

from . import _images
from ._draws import sample_rng

VOID = 255  # Transformers' semantic_loss_ignore_index
Mask = NDArray[np.uint8]


def find_mask(example: Example) -> Media:
    """The row's mask; raises ValueError where it has none, or it cannot be found."""
    if example.fields.get("mask") is None:
        raise ValueError("the row has no mask")
    return find_media(example.fields["mask"], "image", example.root)


def numbers_of(example: Example, without: Sequence[int]) -> list[str]:
    """The numbers that pixels of the row's mask have, as names; `without` those that are no class."""
    return [str(n) for n in np.unique(read_mask(find_mask(example))).tolist() if n not in without]


def check_mask(mask: Media, image: Media, ids: Sequence[int], without: Sequence[int], max_pixels: int) -> float:
    """The share of pixels that have a class.

    Args:
        mask: read once in full.
        image: of the same row.
        ids: the number of each class in a mask.
        without: numbers that are no class.
        max_pixels: a mask may have.

    Raises:
        ValueError: damaged, of another size than the image, or with a number that is no class.
    """
    numbers = read_mask(mask, max_pixels)
    height, width = numbers.shape
    if (width, height) != image_size(image):
        size = " x ".join(map(str, image_size(image)))
        raise ValueError(f"{mask.shown}: the mask has {width} x {height} pixels, its image {size}")
    strange = sorted(set(np.unique(numbers).tolist()) - {*ids, *without})
    if strange:
        raise ValueError(
            f"{mask.shown}: pixels with the number {strange[0]}, which is no class; classes: {_span(ids)}, without a "
            f"class: {_span(without) or 'none'} (task.labels, task.reduce_labels, task.ignore_index)"
        )
    return float(np.isin(numbers, ids).mean())


def _span(numbers: Sequence[int]) -> str:
    found = sorted(numbers)
    return f"{found[0]} to {found[-1]}" if len(found) > 6 else ", ".join(map(str, found))


def classes_of(mask: Media, ids: Sequence[int]) -> Mask:
    """(H, W): the place of each pixel's number in `ids`, or VOID."""
    numbers = read_mask(mask, None)
    table = np.full(max(int(numbers.max()), *ids) + 1, VOID, np.uint8)
    table[list(ids)] = np.arange(len(ids), dtype=np.uint8)
    found: Mask = table[numbers]
    return found


def augmented(sample: Sample, ids: Sequence[int], options: ImageAugment, draw: int) -> tuple[Any, Mask]:
    """The picture and its classes (H, W), changed alike.

    Args:
        sample: with image and mask.
        ids: the number of each class in the mask.
        options: how they are augmented; what comes in from outside of the picture is VOID.
        draw: 0 for not at all.
    """
    image, classes = _images.rgb(sample.inputs["image"]), classes_of(sample.inputs["mask"], ids)
    if not draw or not options.on:
        return image, classes
    view = augment_with(image, options, sample_rng(sample, draw, "augment"), mask=classes)
    return view.image, view.mask.astype(np.uint8)


def shares(classes: Any, labels: Sequence[str]) -> dict[str, float]:
    """The share of each class that is there, largest first, over all pixels (H, W)."""
    counts = np.bincount(np.asarray(classes).ravel(), minlength=len(labels))[: len(labels)]
    found = {name: count / np.size(classes) for name, count in zip(labels, counts.tolist(), strict=True) if count}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def shown(of_class: dict[str, float]) -> str:
    """Shares in words."""
    return ", ".join(f"{name} {share:.0%}" for name, share in of_class.items())
