"""An image and a mask that gives each of its pixels a class."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._media_kind import IMAGE, kind_of
from lora_ft.data._values import absent
from lora_ft.registry import FORMATS

from ._media import NAMES, MediaFormat

MASKS = ("mask", "segmentation_map", "masks")
UNSURE = ("annotation", "label", "labels")  # a mask only where the value is an image
ALIASES = {"image": NAMES["image"][1:], "mask": (*MASKS[1:], *UNSURE)}


class ImageMask(MediaFormat):
    """Semantic segmentation; also what a folder with images/ and masks/ becomes."""

    kind = "image_mask"
    name = "image_mask"
    description = (
        "image, mask (or segmentation_map, annotation): an image of class numbers. Or images/FILE and masks/FILE "
        "folders."
    )
    required = ("image", "mask")
    answer = "mask"
    aliases = ALIASES
    medium = "image"

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """An image and a mask, which is an image too."""
        sure = not columns.isdisjoint(MASKS)
        there = sure or any(kind_of(row.get(n)) == IMAGE for row in first_rows for n in UNSURE)
        return there and super().matches(columns, first_rows)

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The image, and the mask where there is one."""
        fields = {"image": self.medium_of(row)}
        column = self.named("mask", row)
        if column is None or absent(row[column]):
            if answered:
                raise ValueError(
                    f"the mask is missing: {'no such column' if column is None else f'{column!r} is empty'}"
                )
            return fields
        return {**fields, "mask": row[column]}


FORMATS.register(ImageMask())
