"""What is known of each method, since scripts/methods_table.py ran it."""

import json
from importlib.resources import files
from typing import Any


def known_methods() -> dict[str, dict[str, Any]]:
    """Facts by method's name; a plug-in has none."""
    found: dict[str, dict[str, Any]] = json.loads(
        files("lora_ft.report").joinpath("methods.json").read_text(encoding="utf-8")
    )
    return found


def merges(method: str) -> bool:
    """Whether it can be part of its base's weights, as far as is known."""
    return str(known_methods().get(method, {}).get("merges", "yes")).split(",")[0] == "yes"
