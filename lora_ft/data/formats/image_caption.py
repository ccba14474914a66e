"""An image and its caption, or several of them."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._values import absent, text_of
from lora_ft.registry import FORMATS

from ._image_chat import filled
from ._media import NAMES, MediaFormat

QUESTION = "Describe the image."
ALIASES = {"image": NAMES["image"][1:], "caption": ("text", "captions")}


class ImageCaption(MediaFormat):
    """Captions as the answer to a request for one."""

    kind = "image_conversation"
    name = "image_caption"
    description = f"image, caption (or text): the answer to {QUESTION!r}; a list of captions gives an example each."
    required = ("image", "caption")
    answer = "caption"
    aliases = ALIASES
    medium = "image"

    def to_examples(self, row: Mapping[str, Any], answered: bool) -> list[dict[str, Any]]:
        """A conversation for each caption; the request alone where there is none to be had."""
        image, column = self.medium_of(row), self.named("caption", row) or "caption"
        asked = {"role": "user", "content": QUESTION}
        if not answered and absent(row.get(column)):
            return [{"messages": filled([asked], [image])}]
        value = row.get(column)
        if isinstance(value, list) and not value:
            raise ValueError(f"column {column!r} is an empty list")
        captions = [text_of({column: v}, column) for v in value] if isinstance(value, list) else [text_of(row, column)]
        return [{"messages": filled([asked, {"role": "assistant", "content": c}], [image])} for c in captions]


FORMATS.register(ImageCaption())
