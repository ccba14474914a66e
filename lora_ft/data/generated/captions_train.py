"""builtin:captions-train."""

from pathlib import Path

from ._captions import write_captions

VERSION = "1"
DESCRIPTION = "480 pictures of one coloured shape each, with a caption such as 'a red circle'."


def write(folder: Path) -> None:
    """Pictures and metadata.jsonl."""
    write_captions(folder, 0, 480)
