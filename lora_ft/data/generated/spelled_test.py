"""builtin:spelled-test."""

from pathlib import Path

from ._spelled import write_spelled

VERSION = "1"
DESCRIPTION = "80 texts of one or two short words, spelled in tones at 8 kHz, with their letters."


def write(folder: Path) -> None:
    """Sounds and metadata.jsonl."""
    write_spelled(folder, 1, 80)
