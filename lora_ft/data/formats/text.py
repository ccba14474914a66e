"""Plain text: every token is learnt."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import text_of
from lora_ft.registry import FORMATS

ALIASES = {"text": ("sentence", "content")}


class Text(RowFormat):
    """Raw text for continued pretraining; other columns, such as labels, do not matter."""

    kind = "text"
    name = "text"
    description = "text (or sentence, content): raw text, every token is learnt; longer rows are cut into pieces."
    required = ("text",)
    aliases = ALIASES

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The text."""
        return {"text": text_of(row, self.named("text", row) or "text")}


FORMATS.register(Text())
