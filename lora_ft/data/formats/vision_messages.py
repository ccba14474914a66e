"""Chat messages with images: parts in the content, or columns of images."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._conversation import says_from
from lora_ft.data._format import RowFormat
from lora_ft.data._values import as_object
from lora_ft.registry import FORMATS

from ._image_chat import filled, images_of


class VisionMessages(RowFormat):
    """Messages of an image-text model."""

    kind = "image_conversation"
    name = "vision_messages"
    description = (
        "messages: [{role, content: text or [{type: text|image, ...}]}]; images (or image): fill the image parts, or "
        "<image> in the text, in order."
    )
    required = ("messages",)

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """A column of lists of objects that have a role."""
        return "messages" in columns and not says_from(first_rows, "messages")

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Messages with their images in place."""
        if row.get("tools"):
            raise ValueError("column 'tools' is not empty; conversations with images take no tools")
        return {"messages": filled(as_object(row.get("messages"), "messages"), images_of(row))}


FORMATS.register(VisionMessages())
