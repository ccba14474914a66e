"""Images of rows: found and checked once when rows are encoded, read when their batch's turn comes."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lora_ft.errors import ArtifactError
from lora_ft.media import Media, cache, find_media, read_image
from lora_ft.records import EncodeOptions, Example

PATCH = 256  # pixels that cost about as much as a token


def find_image(example: Example, options: EncodeOptions, field: str = "image") -> Media:
    """The row's image, read once in full.

    Args:
        example: with the image under `field`.
        options: how many pixels it may have.
        field: of the example.

    Raises:
        ValueError: it is missing, damaged, too large, outside of the data's folder.
    """
    media = find_media(example.fields.get(field), "image", example.root)
    kept = cache.shared()
    found = kept.get(_key(media))
    if found is None or math.prod(found.shape[:2]) > options.max_pixels:
        kept.put(_key(media), np.asarray(read_image(media, options.max_pixels)))
    return media


def rgb(media: Media) -> Any:
    """The image as a PIL image in RGB, from the cache where it is there."""
    from PIL import Image

    found = cache.shared().through(_key(media), lambda: np.asarray(read_image(media, None)))
    return Image.fromarray(found)


def _key(media: Media) -> str:
    return f"{media.key}-rgb"


def pixel_values(images: Sequence[Any], processor: Any, **settings: Any) -> Tensor:
    """(B, C, H, W): exactly what the model's own processor makes of PIL images.

    Args:
        images: in RGB.
        processor: image processor of Transformers.
        settings: of its call, such as `size`.
    """
    found: Tensor = processor(images=list(images), return_tensors="pt", **settings)["pixel_values"]
    return found


def cost(height: int, width: int) -> int:
    """What an image of this many pixels costs, in tokens."""
    return max(1, math.ceil(height * width / PATCH))


def check_processor(processor: Any) -> None:
    """Refuse what is no image processor.

    Raises:
        ArtifactError: naming what is missing.
    """
    if not hasattr(processor, "image_mean") and not hasattr(processor, "preprocess"):
        raise ArtifactError(
            f"a {type(processor).__name__} is no image processor",
            fix="put the preprocessor_config.json of the model beside its weights",
        )


def resizable(model: Any) -> bool:
    """Whether the model's forward stretches its position embeddings to images of another size when it is told to."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "interpolate_pos_encoding" in inspect.signature(inner.forward).parameters


def named(example: Example, field: str = "image") -> str:
    """The row's image for people: its path as the row has it."""
    value = example.fields.get(field)
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) else f"{field} in the row"
