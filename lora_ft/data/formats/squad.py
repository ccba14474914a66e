"""SQuAD: questions whose answers are spans of a context; the nested files and flat rows."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, as_object, text_of
from lora_ft.registry import FORMATS

SHOWN = 3  # problems of one article that are told


class Squad(RowFormat):
    """Extractive question answering; no answers means that the context has none (SQuAD 2)."""

    kind = "question"
    name = "squad"
    description = "question, context, answers: {text: [...], answer_start: [...]}; or SQuAD's own nested JSON."
    required = ("question", "context", "answers")
    answer = "answers"

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """The three columns, or articles with paragraphs."""
        return "paragraphs" in columns or columns.issuperset(self.required)

    def to_examples(self, row: Mapping[str, Any], answered: bool) -> list[dict[str, Any]]:
        """The one question of a flat row, all questions of an article."""
        if "paragraphs" not in row:
            return [_example(row, answered)]
        found, problems = [], []
        for place, question in _questions(row):
            try:
                found.append(_example(question, answered))
            except ValueError as error:
                problems.append(f"{place}: {error}")
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ValueError("; ".join(problems[:SHOWN]) + more)
        if not found:
            raise ValueError("an article without a question")
        return found

    def group_of(self, fields: Mapping[str, Any], where: str) -> str:
        """Questions on one context stay together."""
        return f"{where} {hashlib.blake2b(fields['context'].encode(), digest_size=8).hexdigest()}"


def _questions(article: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, paragraph in enumerate(article["paragraphs"], 1):
        for index, question in enumerate(paragraph["qas"], 1):
            name = f" ({question['id']})" if question.get("id") else ""
            yield f"paragraph {number} question {index}{name}", {**question, "context": paragraph.get("context")}


def _example(row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"question": text_of(row, "question").strip(), "context": text_of(row, "context")}
    if not absent(row.get("id")):
        fields["id"] = str(row["id"])
    impossible = row.get("is_impossible") in (True, "true", "True")
    if absent(row.get("answers")) and not impossible:
        if answered:
            raise ValueError("column 'answers' is missing; a question without an answer has an empty list")
        return fields
    answers = [] if absent(row.get("answers")) else _answers(as_object(row["answers"], "answers"))
    if impossible and answers:
        raise ValueError("is_impossible is true, but there are answers")
    for answer in answers:
        _check_place(answer, fields["context"])
    return {**fields, "answers": answers}


def _answers(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, Mapping):
        texts, starts = given.get("text", []), given.get("answer_start", [])
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError("answers.text and answers.answer_start must be lists of the same length")
        return [{"text": text, "start": start} for text, start in zip(texts, starts, strict=True)]
    if isinstance(given, list) and all(isinstance(a, Mapping) for a in given):
        return [{"text": a.get("text"), "start": a.get("answer_start", a.get("start"))} for a in given]
    raise ValueError("answers must be {text: [...], answer_start: [...]} or a list of {text, answer_start}")


def _check_place(answer: Mapping[str, Any], context: str) -> None:
    text, start = answer["text"], answer["start"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an answer's text is missing or empty")
    if isinstance(start, bool) or not isinstance(start, int):
        raise ValueError(f"the answer {text!r} has no answer_start, or one that is no whole number")
    if start >= 0 and context.startswith(text, start):
        return
    places = [i for i in range(len(context)) if context.startswith(text, i)]
    hint = f"the nearest place is {min(places, key=lambda i: abs(i - start))}" if places else "it is nowhere in it"
    raise ValueError(f"the answer {text[:60]!r} is not at character {start} of its context; {hint}")


FORMATS.register(Squad())
