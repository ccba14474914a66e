"""A conversation through a tokenizer's own chat template, and which of its characters the assistant wrote.

Templates rarely carry `{% generation %}` marks, so the assistant's spans are found by rendering: the text up to
turn i with the generation prompt is a prefix of the text up to turn i + 1, and what lies between is the answer with
its end token. A template that rewrites history (one that strips old reasoning, say) breaks that property; then each
answer becomes a sample of its own, rendered as the model will see it when it answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

Message = Mapping[str, Any]
# For tokenizers without a template (base models): plain text roles, which every tokenizer can write.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text, and the [start, end) character spans of it that the assistant wrote."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A tokenizer's chat template, with the system prompt of the recipe.

    Args:
        tokenizer: a Transformers tokenizer.
        system_prompt: put before conversations that have no system message.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
        self._tokenizer, self._system = tokenizer, system_prompt
        self._template = None if tokenizer.chat_template else PLAIN_TEMPLATE

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """The text that asks for the next answer."""
        return self._render(self._with_system(messages), tools, generation=True)

    def conversations(self, messages: Sequence[Message], tools: Any = None) -> list[Rendered]:
        """One text with all answers marked, or one per answer when the template rewrites history.

        Raises:
            ValueError: the template refuses this conversation; says why.
        """
        messages = self._with_system(messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        last = turns[-1] + 1 if turns else len(messages)
        whole = self._render(messages[:last], tools)
        spans: list[tuple[int, int]] = []
        for i in turns:
            text = self._render(messages[: i + 1], tools)
            start = self._answer_start(messages[:i], text, tools, str(messages[i]["content"]))
            if not whole.startswith(text) or start is None:
                return [self._single(messages[: i + 1], tools) for i in turns]
            spans.append((start, len(text)))
        return [Rendered(whole, tuple(spans))]

    def _single(self, messages: Sequence[Message], tools: Any) -> Rendered:
        text = self._render(messages, tools)
        start = self._answer_start(messages[:-1], text, tools, str(messages[-1]["content"]))
        if start is None:
            raise ValueError("the chat template renders the answer before its own generation prompt")
        return Rendered(text, ((start, len(text)),))

    def _answer_start(self, before: Sequence[Message], text: str, tools: Any, answer: str) -> int | None:
        """Where the answer begins in `text`, or None when the prompt is no prefix of it."""
        if not before:
            # Nothing asks for the first turn of a conversation that the assistant opens: no prompt to compare with.
            found = text.rfind(answer.strip())
            return found if found >= 0 else None
        prompt = self._render(before, tools, generation=True)
        if text.startswith(prompt):
            return len(prompt)
        # A generation prompt may open something that this answer does not have (a reasoning block): what both share
        # beyond the history is the role header.
        history = self._render(before, tools)
        shared = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), None)
        header = text[: shared or 0].rfind("\n") + 1
        return header if shared and text.startswith(history) and header > len(history) else None

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self._system and (not messages or messages[0]["role"] not in ("system", "developer")):
            return [{"role": "system", "content": self._system}, *messages]
        return list(messages)

    def _render(self, messages: Sequence[Message], tools: Any, generation: bool = False) -> str:
        if not messages:
            return ""
        try:
            return self._apply(messages, tools, generation)
        except TemplateError as error:
            folded = _fold_system(messages)
            if folded is None:
                raise ValueError(f"the chat template refuses this conversation: {error}") from error
        try:
            return self._apply(folded, tools, generation)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _apply(self, messages: Sequence[Message], tools: Any, generation: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (TypeError, KeyError, AttributeError) as error:  # the template asks a value for what it does not have
            raise ValueError(f"the chat template cannot render this conversation: {error}") from error
        return text


def _fold_system(messages: Sequence[Message]) -> list[Message] | None:
    """The system text moved into the first user turn, for templates without a system role (Gemma)."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": joined}, *messages[2:]]
