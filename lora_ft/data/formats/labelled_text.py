"""Text, or a pair of texts, with a label: a class, several classes, or a number."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._label_value import LABEL_NAMES, label_fields
from lora_ft.data._values import absent, text_of
from lora_ft.registry import FORMATS

TEXTS = (
    ("text", "text_pair"), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("sentence",), ("content",),
)  # fmt: skip
ALIASES = {
    "text": ("sentence", "content", "sentence1", "premise", "question1", "question"),
    "label": LABEL_NAMES,
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
        return fields | label_fields(row, self.named("label", row), answered)


FORMATS.register(LabelledText())
