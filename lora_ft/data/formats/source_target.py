"""Text to rewrite and what it becomes: translation, summaries."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, text_of
from lora_ft.registry import FORMATS

ALIASES = {
    "source": ("input_text", "document", "article"), "target": ("target_text", "summary", "highlights"),
}  # fmt: skip


class SourceTarget(RowFormat):
    """A source text and its target text."""

    kind = "prompt"
    name = "source_target"
    description = "source (or input_text, document, article), target (or target_text, summary, highlights)."
    required = ("source", "target")
    answer = "target"
    aliases = ALIASES

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The source as prompt, the target as completion."""
        fields = {"prompt": text_of(row, self.named("source", row) or "source")}
        target = self.named("target", row) or "target"
        if not answered and absent(row.get(target)):
            return fields
        return {**fields, "completion": text_of(row, target)}


FORMATS.register(SourceTarget())
