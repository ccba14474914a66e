"""Words with a tag each."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, list_of
from lora_ft.registry import FORMATS

ALIASES = {"tokens": ("words",), "tags": ("ner_tags", "pos_tags", "labels")}


class TokenTags(RowFormat):
    """Named entities, parts of speech, and whatever else is said of words."""

    kind = "tokens"
    name = "token_tags"
    description = "tokens, tags (or ner_tags, pos_tags, labels): lists of the same length, or words parted by spaces."
    required = ("tokens", "tags")
    answer = "tags"
    aliases = ALIASES

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Tokens, and as many tags where they are given."""
        column = self.named("tokens", row)
        if column is None or absent(row[column]):
            raise ValueError(f"column 'tokens' is missing or empty; found: {', '.join(row)}")
        tokens = [_text(v, column, i) for i, v in enumerate(list_of(row[column], column, None), 1)]
        if not tokens:
            raise ValueError(f"column {column!r} has no words")
        column = self.named("tags", row)
        if column is None or absent(row[column]):
            if answered:
                raise ValueError(f"column 'tags' is missing or empty; found: {', '.join(row)}")
            return {"tokens": tokens}
        tags = [_text(v, column, i) for i, v in enumerate(list_of(row[column], column, None), 1)]
        if len(tags) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens but {len(tags)} tags")
        return {"tokens": tokens, "tags": tags}


def _text(value: Any, column: str, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"number {number} of {column!r} must be text, got {type(value).__name__}")
    if not str(value).strip():
        raise ValueError(f"number {number} of {column!r} is empty")
    return str(value)


FORMATS.register(TokenTags())
