"""Where a base model comes from and under which licence, as far as its own files say."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from . import builtin
from .load import local_folder

LONGEST_CARD = 2**20  # bytes


def origin_of(name: str, source: str) -> dict[str, str]:
    """{"hub_id": ..., "licence": ...} of a base, without what is not known.

    Args:
        name: as in the recipe.
        source: the folder or hub id that it stands for.
    """
    if name.startswith("builtin:"):
        known = builtin.get(name.removeprefix("builtin:"))
        found = {"hub_id": known.hub_id, "licence": known.licence}
    elif name.endswith(".gguf"):
        found = {"licence": _gguf_licence(Path(name).expanduser())}
    else:
        hub = source if source.count("/") == 1 and not Path(source).exists() else ""
        found = {"hub_id": hub, "licence": _card_licence(source)}
    return {k: v for k, v in found.items() if v}


def _card_licence(source: str) -> str:
    """`license` at the head of the README.md beside the weights."""
    try:
        path = local_folder(source) / "README.md"
        if not path.is_file() or path.stat().st_size > LONGEST_CARD:
            return ""
        head: Any = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        return str(head.get("license") or "")
    except (OSError, ValueError, LocalEntryNotFoundError, HfHubHTTPError):
        return ""


def _gguf_licence(file: Path) -> str:
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).get_field("general.license")
    except (OSError, ValueError, IndexError):
        return ""
    return str(field.contents()) if field is not None else ""
