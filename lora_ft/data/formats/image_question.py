"""A question about an image, or several, and its answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import absent, text_of
from lora_ft.registry import FORMATS

from ._image_chat import COLUMNS, filled, images_of

ALIASES = {"image": COLUMNS, "question": ("prompt", "instruction"), "answer": ("completion", "response", "output")}


class ImageQuestion(RowFormat):
    """Visual question answering as one turn each; a prompt may also be a list of messages."""

    kind = "image_conversation"
    name = "image_question"
    description = "image (or images), question (or prompt), answer (or completion): text, or lists of messages."
    required = ("image", "question", "answer")
    answer = "answer"
    aliases = ALIASES

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The images and the question as the user's turn, then the answer."""
        question, answer = self.named("question", row) or "question", self.named("answer", row) or "answer"
        images = images_of(row)
        if not images:
            raise ValueError(f"there is no image; found: {', '.join(c for c in row if not absent(row[c]))}")
        without = not answered and absent(row.get(answer))
        asked = _turns(row, question, "user")
        return {"messages": filled(asked if without else [*asked, *_turns(row, answer, "assistant")], images)}


def _turns(row: Mapping[str, Any], column: str, role: str) -> Sequence[Any]:
    value = row.get(column)
    return value if isinstance(value, list) else [{"role": role, "content": text_of(row, column)}]


FORMATS.register(ImageQuestion())
