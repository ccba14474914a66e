"""OpenAI chat messages: `messages: [{role, content, tool_calls?}]`, optional `tools`."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._conversation import check_messages, says_from
from lora_ft.data._format import RowFormat
from lora_ft.data._values import as_object
from lora_ft.registry import FORMATS


class OpenAIMessages(RowFormat):
    """Chat messages as the OpenAI API takes them, with tools."""

    kind = "conversation"
    name = "openai_messages"
    description = "messages: [{role, content}], optional tools (the OpenAI chat form)."
    required = ("messages",)

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """A column of lists of objects that have a role."""
        return "messages" in columns and not says_from(first_rows, "messages")

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Messages checked; `tools` may be a list or JSON text."""
        fields: dict[str, Any] = {"messages": check_messages(as_object(row.get("messages"), "messages"))}
        tools = as_object(row.get("tools"), "tools") if row.get("tools") else None
        return {**fields, "tools": tools} if tools else fields


FORMATS.register(OpenAIMessages())
