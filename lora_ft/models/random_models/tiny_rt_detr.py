"""builtin:tiny-rt-detr."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, RTDetrForObjectDetection
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from ._write import SEED, draw, fan_in, save

VERSION = "1"
DESCRIPTION = "An RT-DETR with 0.4 M RANDOM weights for pictures of 64 x 64, to try recipes; knows nothing."
SIDE, WIDTH = 64, 64
STEPS = 4096  # of 1, to which what is computed is rounded: its last bits differ between processors


def build(folder: Path) -> None:
    """A ResNet of three stages, the last two of which are looked at, two layers of decoder, ten queries."""
    backbone = AutoConfig.for_model(
        "rt_detr_resnet", embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3"],
    )  # fmt: skip
    config: Any = AutoConfig.for_model(
        "rt_detr", backbone_config=backbone, encoder_hidden_dim=WIDTH, encoder_in_channels=[32, 64],
        feat_strides=[8, 16], encode_proj_layers=[1], num_feature_levels=2, hidden_expansion=0.5,
        encoder_ffn_dim=2 * WIDTH, encoder_attention_heads=4, d_model=WIDTH, decoder_in_channels=[WIDTH, WIDTH],
        decoder_ffn_dim=2 * WIDTH, decoder_layers=2, decoder_attention_heads=4, num_queries=10, num_denoising=0,
        freeze_backbone_batch_norms=False, num_labels=3,
    )  # fmt: skip
    model = RTDetrForObjectDetection(config)
    with torch.no_grad():
        for bias in model.parameters():
            if bias.dim() == 1:
                bias.copy_((bias * STEPS).round() / STEPS)
    draw(model, _spread)
    _set_statistics(model)
    save(model, folder, RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE}))


def _spread(name: str, weight: nn.Parameter) -> float:
    """What the architecture starts at zero stays there, so boxes begin at their anchors; linear layers lack a ReLU."""
    if not bool(weight.any()):
        return 0.0
    return fan_in(name, weight) * (math.sqrt(0.5) if weight.dim() == 2 else 1.0)


def _set_statistics(model: nn.Module) -> None:
    """Give every batch norm the mean and variance that a bright square on dark noise leads to.

    The mean 0 and variance 1 of a new one, which training keeps, would let the signal grow from layer to layer.
    """
    generator = torch.Generator().manual_seed(SEED)
    pixels = 0.375 * torch.rand(16, 3, SIDE, SIDE, generator=generator)
    for image, (left, top) in zip(pixels, torch.randint(0, SIDE - 20, (16, 2), generator=generator), strict=True):
        image[:, top : top + 20, left : left + 20] = 0.5 + 0.5 * torch.rand(3, 1, 1, generator=generator)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.double().eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the statistics are those of this batch
    with torch.no_grad():
        model(pixel_values=pixels.double())
        for norm in norms:
            for values in (norm.running_mean, norm.running_var):
                assert values is not None
                values.copy_((values * STEPS).round() / STEPS)
            norm.momentum = 0.1
            norm.num_batches_tracked.zero_()  # type: ignore[union-attr]
    model.float().eval()
