"""builtin:captions-test."""

from pathlib import Path

from ._captions import write_captions

VERSION = "1"
DESCRIPTION = "60 further pictures with captions, as in builtin:captions-train."


def write(folder: Path) -> None:
    """Pictures and metadata.jsonl."""
    write_captions(folder, 1, 60)
