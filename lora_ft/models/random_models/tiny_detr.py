"""builtin:tiny-detr."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, DetrForObjectDetection
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from ._write import write

VERSION = "1"
DESCRIPTION = "A DETR with 0.2 M RANDOM weights for pictures of about 64 x 64, to try recipes; knows nothing."
SIDE, WIDTH = 64, 64


def build(folder: Path) -> None:
    """A ResNet of two stages, two layers of encoder and two of decoder, eight queries."""
    backbone = AutoConfig.for_model(
        "resnet", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )  # fmt: skip
    config: Any = AutoConfig.for_model(
        "detr", use_timm_backbone=False, backbone_config=backbone, d_model=WIDTH,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH, decoder_ffn_dim=2 * WIDTH, num_queries=8, num_labels=91, dropout=0.0,
        auxiliary_loss=True,
    )  # fmt: skip
    processor = DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": SIDE})
    write(DetrForObjectDetection(config), folder, processor)
