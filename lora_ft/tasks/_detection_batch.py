"""Pictures and boxes as models that find boxes take them."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.media.image_augment import ImageAugment, augment_with
from lora_ft.records import Batch, Sample

from . import _images
from ._draws import sample_rng


def processed_size(height: int, width: int, size: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) that a picture of these has when its processor's `size` was applied."""
    from transformers.image_transforms import get_size_with_aspect_ratio

    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    if size.get("shortest_edge"):
        found: tuple[int, int] = get_size_with_aspect_ratio(
            (height, width), size["shortest_edge"], size.get("longest_edge")
        )
        return found
    shrunk = min(size.get("max_height", height) / height, size.get("max_width", width) / width)
    return round(height * shrunk), round(width * shrunk)


def augmented(sample: Sample, options: ImageAugment, draw: int) -> tuple[Any, list[list[float]], list[int]]:
    """The picture, its boxes as corners in its pixels, and the class of each; without crowds.

    Args:
        sample: with image, boxes, labels and crowd; the last three may be missing.
        options: how it is augmented.
        draw: 0 for not at all.
    """
    image = _images.rgb(sample.inputs["image"])
    width, height = image.size
    rows = zip(*(sample.inputs.get(name, ()) for name in ("boxes", "labels", "crowd")), strict=True)
    plain = [(box, label) for box, label, crowd in rows if not crowd]
    corners = [[max(0.0, x), max(0.0, y), min(width, x + w), min(height, y + h)] for (x, y, w, h), _ in plain]
    labels = [label for _, label in plain]
    if not draw or not options.on:
        return image, corners, labels
    view = augment_with(image, options, sample_rng(sample, draw, "augment"), boxes=corners)
    return view.image, view.boxes.tolist(), [labels[i] for i in view.kept]


def target(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], size: tuple[int, int], per_picture: float
) -> dict[str, Tensor]:
    """What the model's loss takes for one picture: centre, width and height in shares of the picture.

    Args:
        boxes: corners in pixels.
        labels: class of each.
        size: width and height of the picture.
        per_picture: boxes that a picture of the step has on average.
    """
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    first, second = corners[:, :2], corners[:, 2:]
    shares = torch.cat([(first + second) / 2, second - first], -1) / torch.tensor([*size, *size])
    return {
        "class_labels": torch.tensor(labels, dtype=torch.long),
        "boxes": shares.float(),
        "per_picture": torch.tensor(float(per_picture)),
    }


def padded_pictures(images: Sequence[Tensor]) -> Batch:
    """pixel_values (B, C, H, W) of pictures (C, h, w), zeros on the right and below; pixel_mask is 1 where they are."""
    height, width = (max(i.shape[d] for i in images) for d in (1, 2))
    pixels = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for n, image in enumerate(images):
        pixels[n, :, : image.shape[1], : image.shape[2]] = image
        mask[n, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_mask": mask}


def by_size(model: nn.Module, batch: Batch) -> Iterator[tuple[list[int], Batch]]:
    """The pictures of each size, without filling: their places in the batch, and a batch of them.

    Args:
        model: gets pixel_mask only where it takes one.
        batch: of `padded_pictures`, with or without "labels".
    """
    base = getattr(model, "get_base_model", lambda: model)()
    masked = "pixel_mask" in inspect.signature(base.forward).parameters
    sizes: dict[tuple[int, int], list[int]] = {}
    mask = batch["pixel_mask"]
    for row, (height, width) in enumerate(torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], 1).tolist()):
        sizes.setdefault((height, width), []).append(row)
    for (height, width), rows in sizes.items():
        one: Batch = {"pixel_values": batch["pixel_values"][rows, :, :height, :width]}
        if masked:
            one["pixel_mask"] = mask[rows, :height, :width]
        if "labels" in batch:
            one["labels"] = [batch["labels"][row] for row in rows]
        yield rows, one
