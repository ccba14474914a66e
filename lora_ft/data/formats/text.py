"""Plain text: every token is learnt."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._conversation import text_of
from lora_ft.registry import FORMATS


class Text:
    """Raw text for continued pretraining."""

    name = "text"
    description = "text: raw text, every token is learnt; longer rows are cut into pieces."
    required = ("text",)
    answer: str | None = None

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """A text column and nothing else that a format knows."""
        return "text" in columns

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The text."""
        return {"text": text_of(row, "text")}


FORMATS.register(Text())
