"""builtin:tiny-resnet."""

from pathlib import Path

from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from ._statistics import calibrate
from ._write import draw, save

VERSION = "1"
DESCRIPTION = "A ResNet with 0.3 M RANDOM weights for images of 32 x 32, to try recipes; knows nothing."
SIZE = 32


def build(folder: Path) -> None:
    """Three stages of basic blocks, 32 to 96 channels, as ResNet-18 has them."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 96], depths=[1, 1, 1], layer_type="basic",
        downsample_in_first_stage=False,
    )  # fmt: skip
    config.num_labels = 10
    processor = ConvNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_pct=1.0)
    model = ResNetForImageClassification(config)
    draw(model)
    calibrate(model, (SIZE, SIZE))
    save(model, folder, processor)
