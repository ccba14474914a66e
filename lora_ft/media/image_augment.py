"""Augmentation of images: functions of the image, the options and one random generator, and of nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from ._options import Augment, Share, Strength

RATIO = (3 / 4, 4 / 3)  # width / height of a crop
TRIES = 10
VOID = 255  # class of pixels that come in from outside of the image
LEFT = 0.1  # share of a box's area from which it is still shown
FILL = (124, 116, 104)  # ImageNet's mean colour
Rng = np.random.Generator


class ImageAugment(Augment):
    """How training images are changed, each epoch anew. Meanings are torchvision's."""

    crop: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="[least, most] share of the area of a random crop, such as [0.5, 1]."
    )
    pad_crop: Annotated[int, Field(ge=0)] = Field(
        0, description="Pixels of padding around the image, of which a crop of the first size is taken."
    )
    flip: Share = Field(0.0, description="Probability of a horizontal flip.")
    vertical_flip: Share = Field(0.0, description="Probability of a vertical flip.")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="Most degrees of rotation to either side.")
    brightness: Strength = Field(0.0, description="Factor from 1 - x to 1 + x.")
    contrast: Strength = Field(0.0, description="Factor from 1 - x to 1 + x.")
    saturation: Strength = Field(0.0, description="Factor from 1 - x to 1 + x.")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.0, description="Shift of the hue by up to x of its circle.")
    erase: Share = Field(0.0, description="Probability that a random box of 2 to 33 % of the image is painted over.")
    mixup: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Beta parameter of mixing an image and its label with another one's; 0: off. Classification."
    )
    cutmix: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Beta parameter of pasting a box of another image; 0: off. Classification only."
    )

    @field_validator("crop")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("the least share of a crop is larger than the most")
        return value


@dataclass(frozen=True)
class View:
    """An augmented image with what belongs to it.

    Attributes:
        image: PIL image in RGB.
        mask: class ids (H, W), or None.
        boxes: (N, 4) corners x0, y0, x1, y1 in pixels.
        kept: indices of the boxes that are still there.
    """

    image: Any
    mask: Any
    boxes: Any
    kept: list[int]


def augment_image(image: Any, options: ImageAugment, rng: Rng) -> Any:
    """The image, changed."""
    return augment_with(image, options, rng).image


def augment_with(
    image: Any, options: ImageAugment, rng: Rng, mask: Any = None, boxes: Sequence[Sequence[float]] = ()
) -> View:
    """The image with its mask and boxes; what moves pixels moves all of them alike.

    Args:
        image: PIL image in RGB.
        options: what to do.
        rng: of this image alone.
        mask: class ids (H, W); what comes in from outside of the image is 255.
        boxes: corners x0, y0, x1, y1; one of which less than a tenth is left is dropped.
    """
    from PIL import Image

    label = None if mask is None else Image.fromarray(np.asarray(mask).astype(np.int32))
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    areas = _areas(corners)
    for step in (_pad_crop, _crop, _rotate, _flip):
        image, label, corners = step(image, label, corners, options, rng)
    width, height = image.size
    corners = corners.clip(0, [width, height, width, height])
    left = _areas(corners)
    kept = [i for i in range(len(corners)) if left[i] >= LEFT * areas[i] > 0]
    image = _erase(_colours(image, options, rng), options, rng)
    return View(image, None if label is None else np.asarray(label).astype(np.int64), corners[kept], kept)


def _areas(corners: Any) -> Any:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def _pad_crop(image: Any, label: Any, corners: Any, options: ImageAugment, rng: Rng) -> Any:
    pad = options.pad_crop
    if not pad:
        return image, label, corners
    left, top = (int(v) for v in rng.integers(-pad, pad + 1, size=2))
    width, height = image.size
    return _cut(image, label, corners, (left, top, left + width, top + height))


def _crop(image: Any, label: Any, corners: Any, options: ImageAugment, rng: Rng) -> Any:
    if options.crop is None:
        return image, label, corners
    width, height = image.size
    for _ in range(TRIES):
        area = width * height * rng.uniform(*options.crop)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - high + 1))
            return _cut(image, label, corners, (left, top, left + wide, top + high))
    return _cut(image, label, corners, _middle(width, height))


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest part in the middle whose ratio is allowed, for images that are too long for any other."""
    wide = max(1, min(width, round(height * RATIO[1])))
    high = max(1, min(height, round(width / RATIO[0])))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _cut(image: Any, label: Any, corners: Any, box: tuple[int, int, int, int]) -> Any:
    """A part of the image, which may reach over its edges."""
    from PIL import Image

    left, top, right, bottom = box
    canvas = Image.new("RGB", (right - left, bottom - top), FILL)
    canvas.paste(image, (-left, -top))
    if label is not None:
        ground = Image.new(label.mode, canvas.size, VOID)
        ground.paste(label, (-left, -top))
        label = ground
    return canvas, label, corners - np.array([left, top, left, top])


def _rotate(image: Any, label: Any, corners: Any, options: ImageAugment, rng: Rng) -> Any:
    from PIL import Image

    if not options.rotate:
        return image, label, corners
    angle = float(rng.uniform(-options.rotate, options.rotate))
    image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=FILL)
    if label is not None:
        label = label.rotate(angle, Image.Resampling.NEAREST, fillcolor=VOID)
    return image, label, _turned(corners, angle, image.size)


def _turned(corners: Any, angle: float, size: tuple[int, int]) -> Any:
    """The boxes around the turned boxes; PIL turns against the clock, and y points down."""
    if not len(corners):
        return corners
    centre = np.array(size) / 2
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points = corners[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    turned = (points - centre) @ matrix.T + centre
    return np.concatenate([turned.min(1), turned.max(1)], 1)


def _flip(image: Any, label: Any, corners: Any, options: ImageAugment, rng: Rng) -> Any:
    from PIL import ImageOps

    width, height = image.size
    across, down = rng.random(2) < (options.flip, options.vertical_flip)
    if across:
        image, label = ImageOps.mirror(image), None if label is None else ImageOps.mirror(label)
        corners = np.stack([width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], 1)
    if down:
        image, label = ImageOps.flip(image), None if label is None else ImageOps.flip(label)
        corners = np.stack([corners[:, 0], height - corners[:, 3], corners[:, 2], height - corners[:, 1]], 1)
    return image, label, corners


def _colours(image: Any, options: ImageAugment, rng: Rng) -> Any:
    from PIL import Image, ImageEnhance

    for name, kind in (("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color")):
        strength = getattr(options, name)
        if strength:
            image = getattr(ImageEnhance, kind)(image).enhance(float(rng.uniform(1 - strength, 1 + strength)))
    if options.hue:
        hue, saturation, value = image.convert("HSV").split()
        shift = round(256 * rng.uniform(-options.hue, options.hue))
        turned = ((np.asarray(hue).astype(np.int16) + shift) % 256).astype(np.uint8)
        image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    return image


def _erase(image: Any, options: ImageAugment, rng: Rng) -> Any:
    if rng.random() >= options.erase:
        return image
    width, height = image.size
    area, ratio = width * height * rng.uniform(0.02, 0.33), math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
    wide, high = (max(1, min(n, round(math.sqrt(s)))) for n, s in ((width, area * ratio), (height, area / ratio)))
    left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - high + 1))
    image = image.copy()
    image.paste(FILL, (left, top, left + wide, top + high))
    return image


def blend(pixels: Tensor, other: Tensor, rng: Rng, options: ImageAugment) -> tuple[Tensor, float]:
    """An image (C, H, W) mixed with another of its size, and the share of its own label that stays.

    mixup: l x + (1 - l) y with l from Beta(a, a) (Zhang et al. 2018, arXiv:1710.09412). cutmix: a box of y of the share
    1 - l, cut at the edges (Yun et al. 2019, arXiv:1905.04899). With both, one of them is drawn.
    """
    paste = bool(options.cutmix) and (not options.mixup or rng.random() < 0.5)
    alpha = options.cutmix if paste else options.mixup
    share = float(rng.beta(alpha, alpha))
    if not paste:
        return pixels * share + other * (1 - share), share
    height, width = pixels.shape[-2:]
    side = math.sqrt(1 - share)
    y, x = rng.integers(0, height), rng.integers(0, width)
    top, bottom = (int(np.clip(y + s * height * side / 2, 0, height)) for s in (-1, 1))
    left, right = (int(np.clip(x + s * width * side / 2, 0, width)) for s in (-1, 1))
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
