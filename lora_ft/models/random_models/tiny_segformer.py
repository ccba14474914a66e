"""builtin:tiny-segformer."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, SegformerForSemanticSegmentation
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from ._write import write

VERSION = "1"
DESCRIPTION = "A SegFormer with 0.2 M RANDOM weights for pictures of 64 x 64, to try recipes; knows nothing."
SIZE = 64


def build(folder: Path) -> None:
    """Three stages, the first of half the picture's width and height."""
    config: Any = AutoConfig.for_model(
        "segformer", num_encoder_blocks=3, depths=[1, 1, 1], sr_ratios=[4, 2, 1], hidden_sizes=[32, 48, 64],
        patch_sizes=[5, 3, 3], strides=[2, 2, 2], num_attention_heads=[1, 2, 4], mlp_ratios=[2, 2, 2],
        decoder_hidden_size=64, num_labels=150,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    processor = SegformerImageProcessorPil(size={"height": SIZE, "width": SIZE})
    write(SegformerForSemanticSegmentation(config), folder, processor)
