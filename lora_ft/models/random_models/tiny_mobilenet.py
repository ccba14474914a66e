"""builtin:tiny-mobilenet."""

from pathlib import Path

from transformers import MobileNetV2Config, MobileNetV2ForImageClassification
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

from ._statistics import calibrate
from ._write import draw, save

VERSION = "1"
DESCRIPTION = "A MobileNetV2 of a quarter of the width, RANDOM weights, for images of 224 x 224, to try recipes."
SIZE = 224


def build(folder: Path) -> None:
    """All blocks of MobileNetV2 with depth_multiplier 0.25; global average pooling as it has."""
    config = MobileNetV2Config(image_size=SIZE, depth_multiplier=0.25, classifier_dropout_prob=0.0)
    config.num_labels = 10
    processor = MobileNetV2ImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": SIZE, "width": SIZE})
    model = MobileNetV2ForImageClassification(config)
    draw(model)
    calibrate(model, (SIZE, SIZE))
    save(model, folder, processor)
