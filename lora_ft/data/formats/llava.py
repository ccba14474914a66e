"""LLaVA: an image and ShareGPT's conversations, in which `<image>` marks its place."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.registry import FORMATS

from ._image_chat import COLUMNS, filled, images_of
from .sharegpt import COLUMNS as CONVERSATIONS
from .sharegpt import ShareGPT

ALIASES = {"image": COLUMNS, "conversations": CONVERSATIONS[1:]}


class Llava(RowFormat):
    """Conversations of {from, value} pairs with images; a row may have none."""

    kind = "image_conversation"
    name = "llava"
    description = "image (or images), conversations: [{from: human|gpt|system, value}] with <image> in the text."
    required = ("image", "conversations")
    aliases = ALIASES

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Roles as ShareGPT's, images in place of their marks."""
        if row.get("tools"):
            raise ValueError("column 'tools' is not empty; conversations with images take no tools")
        return {"messages": filled(ShareGPT().to_example(row, answered)["messages"], images_of(row))}


FORMATS.register(Llava())
