"""builtin:tiny-vit."""

from pathlib import Path

from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ._write import write

VERSION = "1"
DESCRIPTION = "A ViT with 0.1 M RANDOM weights for images of 32 x 32, to try recipes; knows nothing."
SIZE = 32


def build(folder: Path) -> None:
    """Three layers of width 64 on patches of 4 x 4."""
    config = ViTConfig(
        image_size=SIZE, patch_size=4, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 10
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    write(ViTForImageClassification(config), folder, processor)
