"""Running statistics of batch norm for random weights, as a pretrained network has them."""

from typing import Any

import torch
from torch import Tensor, nn

from ._write import SEED


def calibrate(model: nn.Module, pixels: tuple[int, int], batch: int = 32) -> None:
    """Set every batch norm's mean and variance to those of what reaches it from seeded images of that many pixels.

    The images are of one colour each, with spots of another, large or small: as different as photos are.

    Frozen statistics of 0 and 1 would let the signal of random weights grow from block to block.
    """
    generator = torch.Generator().manual_seed(SEED)
    images = torch.stack([_image(2 ** (2 + i % 4), pixels, generator) for i in range(batch)])
    hooks = [m.register_forward_pre_hook(_set) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model.double().eval()(pixel_values=images.double())
    model.float()
    for hook in hooks:
        hook.remove()


def _image(cells: int, pixels: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(3, H, W) from -1 to 1."""
    ground, spots = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
    where = torch.rand(1, 1, cells, cells, generator=generator)
    share = nn.functional.interpolate(where, size=pixels, mode="bilinear", align_corners=False)[0]
    image: Tensor = ground + (spots - ground) * (share > 0.5)
    return image


def _set(norm: Any, arguments: tuple[Tensor, ...]) -> None:
    values = arguments[0]
    # In float64 and rounded, so that sums in another order on another machine give the same bits.
    norm.running_mean.copy_(_rounded(values.mean((0, 2, 3))))
    norm.running_var.copy_(_rounded(values.var((0, 2, 3)).clamp_min(1e-4)))


def _rounded(values: Tensor) -> Tensor:
    return torch.round(values * 1024) / 1024 + 1 / 1024
