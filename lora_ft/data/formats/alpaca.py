"""Alpaca: `instruction`, optional `input`, `output`, optional `system` and `history`."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import text_of
from lora_ft.registry import FORMATS


class Alpaca(RowFormat):
    """Instruction data as one user turn and one answer."""

    kind = "conversation"
    name = "alpaca"
    description = "instruction, input (optional), output; system and history (optional)."
    required = ("instruction", "output")
    answer = "output"

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """Both required columns are there."""
        return {"instruction", "output"} <= columns

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The input follows the instruction after a blank line, as in the Alpaca data set."""
        question = text_of(row, "instruction")
        if row.get("input"):
            question = f"{question}\n\n{row['input']}"
        messages = [{"role": "system", "content": str(row["system"])}] if row.get("system") else []
        for user, assistant in row.get("history") or ():
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        messages.append({"role": "user", "content": question})
        if answered or row.get("output"):
            messages.append({"role": "assistant", "content": text_of(row, "output")})
        return {"messages": messages}


FORMATS.register(Alpaca())
