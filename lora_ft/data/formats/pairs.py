"""Two texts that belong together, and perhaps one that does not."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, text_of
from lora_ft.registry import FORMATS

SURE = {"anchor": ("anchor", "query"), "positive": ("positive", "pos"), "negative": ("negative", "neg")}
# These belong together only where no column says whether they do.
UNLABELLED = (("sentence1", "sentence2"), ("question", "answer"), ("query", "answer"))
LABELS = ("label", "labels", "score", "similarity")
ALONE = ("text", "sentence", "question", "sentence1")  # a text to embed
ALIASES = {"anchor": ("query", *ALONE), "positive": ("pos", "sentence2", "answer")}


class Pairs(RowFormat):
    """Pairs and triplets for embeddings that are compared."""

    kind = "pairs"
    name = "pairs"
    description = (
        "anchor, positive, negative (optional); or query, pos, neg; sentence1, sentence2 or question, answer without a "
        "label."
    )
    required = ("anchor", "positive")
    answer = "positive"
    aliases = ALIASES

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """An anchor with a positive, or a pair that nothing else is said about."""
        if any(c in columns for c in SURE["positive"]):
            return any(c in columns for c in (*SURE["anchor"], *ALONE))
        return any(columns.issuperset(p) for p in UNLABELLED) and not columns.intersection(LABELS)

    def to_examples(self, row: Mapping[str, Any], answered: bool) -> list[dict[str, Any]]:
        """One example; of lists of positives and negatives as many as the longer list has, the other list repeated."""
        pair = next((p for p in UNLABELLED if all(c in row for c in p)), None)
        anchor = next((c for c in SURE["anchor"] if c in row), pair[0] if pair else self.named("anchor", row))
        positive = next((c for c in SURE["positive"] if c in row), pair[1] if pair else None)
        negative = next((c for c in SURE["negative"] if c in row and not absent(row[c])), None)
        first = {"anchor": text_of(row, anchor or "anchor")}
        if positive is None or absent(row[positive]):
            if answered:
                raise ValueError(f"column 'positive' is missing or empty; found: {', '.join(row)}")
            return [first]
        texts = {"positive": _texts(row, positive)}
        if negative:
            texts["negative"] = _texts(row, negative)
        longest = max(len(t) for t in texts.values())
        return [{**first, **{name: t[i % len(t)] for name, t in texts.items()}} for i in range(longest)]


def _texts(row: Mapping[str, Any], column: str) -> list[str]:
    values = row[column]
    if not isinstance(values, list):
        return [text_of(row, column)]
    if not values:
        raise ValueError(f"column {column!r} is an empty list")
    return [text_of({column: value}, column) for value in values]


FORMATS.register(Pairs())
