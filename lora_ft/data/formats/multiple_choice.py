"""A question with choices, one of which is right."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, as_object, text_of
from lora_ft.registry import FORMATS

LETTERS = "ABCDEFGHIJ"
ALIASES = {
    "question": ("ctx", "sent1"), "choices": ("endings", "ending0", "A"), "label": ("answer", "answerKey"),
}  # fmt: skip


class MultipleChoice(RowFormat):
    """Questions in the layouts of SWAG, HellaSwag, MMLU, ARC, and tables with a column for each choice."""

    kind = "choices"
    name = "multiple_choice"
    description = (
        "question (or ctx, sent1), choices (or endings, ending0.., A, B, ..), label (or answer): index, letter or text."
    )
    required = ("question", "choices", "label")
    answer = "label"
    aliases = ALIASES

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """Question and label under one of their names; a column of choices, or at least two columns of one each."""
        several = "choices" in columns or "endings" in columns or len(_columns_of_choices(columns)) > 1
        return several and all(self.named(c, columns) for c in ("question", "label"))

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Question, choices and the index of the right one; SWAG's `sent2` begins every choice."""
        choices, names = _choices(row)
        if not absent(row.get("sent2")):
            choices = [f"{text_of(row, 'sent2')} {choice}" for choice in choices]
        fields: dict[str, Any] = {
            "question": text_of(row, self.named("question", row) or "question"),
            "choices": choices,
        }
        column = self.named("label", row)
        value = None if column is None else row[column]
        if absent(value) or (value in (-1, "-1") and not answered):
            if answered:
                raise ValueError("the label is missing")
            return fields
        return {**fields, "label": _index(value, choices, names)}


def _columns_of_choices(columns: frozenset[str] | Mapping[str, Any]) -> list[str]:
    endings = sorted((c for c in columns if re.fullmatch(r"ending\d+", c)), key=lambda c: int(c.removeprefix("ending")))
    letters = [letter for n, letter in enumerate(LETTERS) if all(c in columns for c in LETTERS[: n + 1])]
    return endings or letters


def _choices(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Texts, and the names by which a label may call them."""
    column = next((c for c in ("choices", "endings") if c in row), None)
    names = list(LETTERS)
    if column is None:
        texts: Any = [row[c] for c in _columns_of_choices(row)]
        while texts and absent(texts[-1]):
            texts.pop()
    else:
        texts = as_object(row[column], column)
    if isinstance(texts, Mapping):  # ARC: {"text": [...], "label": ["A", ...]}
        names, texts = [str(n) for n in texts.get("label", LETTERS)], texts.get("text")
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError(f"{column or 'the columns of choices'} must hold at least two choices")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"choice {number} is empty or not text")
    return texts, names[: len(texts)]


def _index(value: Any, choices: Sequence[str], names: Sequence[str]) -> int:
    """The index that a label means; raises ValueError when that is none, or two."""
    if isinstance(value, int) and not isinstance(value, bool):
        means = {value} if 0 <= value < len(choices) else set()
    else:
        text = str(value).strip()
        means = {i for i, c in enumerate(choices) if c.strip() == text}
        means |= {i for i, n in enumerate(names) if n == text.upper()}
        if text.isdecimal() and text not in names and int(text) < len(choices):
            means.add(int(text))
    if len(means) != 1:
        what = "may mean more than one choice" if means else "is none of the choices"
        raise ValueError(f"the label {value!r} {what}; allowed: 0 to {len(choices) - 1}, {', '.join(names)}, or a text")
    return means.pop()


FORMATS.register(MultipleChoice())
