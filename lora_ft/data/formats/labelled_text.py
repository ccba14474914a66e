"""Text, or a pair of texts, with a label: a class, several classes, or a number."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, list_of, number_of, text_of
from lora_ft.registry import FORMATS

TEXTS = (
    ("text", "text_pair"), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("sentence",), ("content",),
)  # fmt: skip
NUMBERS = ("score", "rating")
SEVERAL = "labels"
ALIASES = {
    "text": ("sentence", "content", "sentence1", "premise", "question1", "question"),
    "label": (SEVERAL, "category", "intent", "sentiment", "class", *NUMBERS),
}


class LabelledText(RowFormat):
    """Text classification and regression."""

    kind = "labelled"
    name = "labelled_text"
    description = (
        "text (or sentence1, sentence2; premise, hypothesis), label: a class or number; labels: a list or 'a|b'; "
        "score, rating: a number."
    )
    required = ("text", "label")
    answer = "label"
    aliases = ALIASES

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """One of the usual names of texts, and of labels."""
        return any(columns.issuperset(names) for names in TEXTS) and self.named("label", columns) is not None

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Text in the order of the columns' names, and the label where there is one."""
        names = next((n for n in TEXTS if all(c in row for c in n)), ("text",))
        fields: dict[str, Any] = {"text": text_of(row, names[0])}
        if len(names) > 1 and not (names[1] == "text_pair" and absent(row["text_pair"])):
            fields["text_pair"] = text_of(row, names[1])
        column = self.named("label", row)
        if column is None or (absent(row[column]) and not (column == SEVERAL and row[column] == "")):
            if answered:
                raise ValueError(
                    f"the label is missing: {'no such column' if column is None else f'{column!r} is empty'}"
                )
            return fields
        return fields | _label(row[column], column)


def _label(value: Any, column: str) -> dict[str, Any]:
    if column in NUMBERS:
        return {"label": number_of(value, column)}
    if isinstance(value, list | tuple) or (column == SEVERAL and isinstance(value, str)):
        return {"labels": [_class(v, column) for v in list_of(value, column, "|")]}
    if isinstance(value, int | float) and not isinstance(value, bool):
        number_of(value, column)
        return {"label": value}
    return {"label": _class(value, column)}


def _class(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise ValueError(f"column {column!r} must hold a class or a number, got {type(value).__name__}")
    name = str(value).strip()
    if not name:
        raise ValueError(f"column {column!r} holds an empty class name")
    return name


FORMATS.register(LabelledText())
