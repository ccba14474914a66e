"""ShareGPT: `conversations: [{from, value}]` and the aliases that data sets on the hub use."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._conversation import check_messages, says_from
from lora_ft.data._format import RowFormat
from lora_ft.data._values import as_object
from lora_ft.registry import FORMATS

COLUMNS = ("conversations", "conversation", "dialogue", "dialog", "chat")
ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip


class ShareGPT(RowFormat):
    """Conversations of {from, value} pairs."""

    kind = "conversation"
    name = "sharegpt"
    description = "conversations: [{from: human|gpt|system|tool, value}]; role/content and other aliases too."
    required = ("conversations",)

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """One of the usual column names, or rows of `messages` that say from/value."""
        return any(c in columns for c in COLUMNS) or says_from(first_rows, "messages")

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Roles and keys translated to the canonical ones; a `system` column becomes the first message."""
        column = next((c for c in (*COLUMNS, "messages") if row.get(c)), "conversations")
        turns = as_object(row.get(column), column)
        if not isinstance(turns, list):
            raise ValueError(f"{column!r} must be a list of turns, got {type(turns).__name__}")
        messages = [self._message(t, i) for i, t in enumerate(turns)]
        if row.get("system") and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": str(row["system"])})
        fields: dict[str, Any] = {"messages": check_messages(messages)}
        tools = as_object(row["tools"], "tools") if row.get("tools") else None
        return {**fields, "tools": tools} if tools else fields

    def _message(self, turn: Any, index: int) -> dict[str, Any]:
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {index + 1} must be an object, got {type(turn).__name__}")
        role = str(turn.get("from") or turn.get("role") or turn.get("speaker") or "")
        if role.lower() not in ROLES:
            raise ValueError(f"turn {index + 1} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        content = next((turn[k] for k in ("value", "content", "text") if turn.get(k) is not None), None)
        return {"role": ROLES[role.lower()], "content": content}


FORMATS.register(ShareGPT())
