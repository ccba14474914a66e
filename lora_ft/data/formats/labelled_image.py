"""An image and its class, or its several classes."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._label_value import LABEL_NAMES, label_fields
from lora_ft.registry import FORMATS

from ._media import NAMES, MediaFormat

ALIASES = {"image": NAMES["image"][1:], "label": (*LABEL_NAMES, "target", "y")}


class LabelledImage(MediaFormat):
    """Image classification; also what a folder with a subfolder for each class becomes."""

    kind = "labelled_image"
    name = "labelled_image"
    description = (
        "image (or file_name, path): a path, bytes or array; label: a class; labels: a list or 'a|b'. Or CLASS/FILE "
        "folders."
    )
    required = ("image", "label")
    answer = "label"
    aliases = ALIASES
    medium = "image"

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The image, and the label where there is one."""
        return {"image": self.medium_of(row), **label_fields(row, self.named("label", row), answered)}


FORMATS.register(LabelledImage())
