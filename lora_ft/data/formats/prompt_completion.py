"""Prompt and completion: two strings, or two lists of messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._conversation import check_messages
from lora_ft.data._format import RowFormat
from lora_ft.data._values import text_of
from lora_ft.registry import FORMATS


class PromptCompletion(RowFormat):
    """A prompt and the answer to it."""

    kind = "prompt"
    name = "prompt_completion"
    description = "prompt, completion: strings (one chat turn where there is a template), or lists of messages."
    required = ("prompt", "completion")
    answer = "completion"

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """Both columns are there."""
        return {"prompt", "completion"} <= columns

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Lists of messages are joined; strings stay apart, for the task to put into the template or not."""
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list) and (isinstance(completion, list) or not (answered or completion)):
            return {"messages": check_messages([*prompt, *(completion or [])])}
        if isinstance(prompt, list) or isinstance(completion, list):
            raise ValueError("prompt and completion must both be text or both be lists of messages")
        if not answered and not completion:
            return {"prompt": text_of(row, "prompt")}
        return {"prompt": text_of(row, "prompt"), "completion": text_of(row, "completion")}


FORMATS.register(PromptCompletion())
