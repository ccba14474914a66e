"""Checks that the conversation formats share."""

from collections.abc import Mapping, Sequence
from typing import Any

from ._values import as_object

ROLES = ("system", "developer", "user", "assistant", "tool")


def says_from(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether the turns in `column` name their speaker by `from`, as ShareGPT does, rather than `role`."""
    turns = next((r[column] for r in rows if isinstance(r.get(column), list) and r[column]), None)
    return turns is not None and isinstance(turns[0], Mapping) and "from" in turns[0] and "role" not in turns[0]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with known roles and usable content; raises ValueError with the turn's number."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"turn {number} must be an object, got {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"turn {number} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        content = _content(message, number)
        calls = message.get("tool_calls")
        if role == "assistant" and not calls and not content.strip():
            raise ValueError(f"turn {number}: the assistant's answer is empty")
        keep = {k: v for k, v in message.items() if v is not None and k != "content"}
        if calls:
            keep["tool_calls"] = [_tool_call(c, number) for c in calls]
        checked.append({**keep, "role": role, "content": content})
    return checked


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """The API gives arguments as JSON text; templates write objects, and would quote the text once more."""
    if not isinstance(call, Mapping):
        raise ValueError(f"turn {number}: a tool call must be an object, got {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments", {}), str):
        return dict(call)
    parsed = {**function, "arguments": as_object(function["arguments"], "tool_calls.arguments")}
    return {**call, "function": parsed} if "function" in call else parsed


def _content(message: Mapping[str, Any], number: int) -> str:
    content = message.get("content")
    if content is None:
        content = ""
    if isinstance(content, list):  # [{"type": "text", "text": ...}]
        if not all(isinstance(p, Mapping) and p.get("type", "text") == "text" for p in content):
            raise ValueError(f"turn {number}: only text parts can be trained on with this task")
        content = "".join(str(p.get("text", "")) for p in content)
    if not isinstance(content, str):
        raise ValueError(f"turn {number}: content must be text, got {type(content).__name__}")
    return content
