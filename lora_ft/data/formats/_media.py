"""What formats of rows with an image or a sound share."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_ft.data._format import RowFormat
from lora_ft.data._media_kind import AUDIO, IMAGE, kind_of
from lora_ft.data._values import absent, number_of

# Names that say what is in them, and names that do so only when the value is one.
SURE = {
    IMAGE: ("image", "images", "img", "image_path"),
    AUDIO: ("audio", "audios", "sound", "audio_path", "audio_filepath"),
}
FILES = ("file_name", "filename", "file", "path", "filepath", "file_path")
ARRAYS = ("inputs", "x", "X")
NAMES = {IMAGE: (*SURE[IMAGE], *FILES, "pixel_values", *ARRAYS), AUDIO: (*SURE[AUDIO], *FILES, *ARRAYS)}
RATES = ("sampling_rate", "sample_rate")


class MediaFormat(RowFormat):
    """Base of formats whose first required column, called as its medium, holds an image or a sound.

    Attributes:
        medium: image or audio.
    """

    medium: ClassVar[str]

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """The medium under a name that says so, or under one like `path` whose value is one; and all other columns."""
        others = (c for c in self.required if c != self.medium)
        sure = not columns.isdisjoint(SURE[self.medium])
        there = sure or any(kind_of(row.get(n)) == self.medium for row in first_rows for n in NAMES[self.medium])
        return there and all(self.named(c, columns) is not None for c in others)

    def medium_of(self, row: Mapping[str, Any]) -> Any:
        """The image or sound as the row has it; raises ValueError where it is missing."""
        names = [n for n in NAMES[self.medium] if n in row]
        sure = (n for n in names if n in SURE[self.medium])
        one = (n for n in names if kind_of(row[n]) == self.medium)
        name = next(sure, None) or next(one, None) or next(iter(names), None)
        if name is None:
            raise ValueError(f"column {self.medium!r} is missing; found: {', '.join(row)}")
        if absent(row[name]):
            raise ValueError(f"column {name!r} is empty")
        return _with_rate(row[name], row) if self.medium == AUDIO else row[name]


def _with_rate(value: Any, row: Mapping[str, Any]) -> Any:
    """An array of sound together with the rate that stands in a column of its own."""
    rate = next((row[n] for n in RATES if not absent(row.get(n))), None)
    if rate is None or not (isinstance(value, list) or hasattr(value, "dtype")):
        return value
    return {"array": value, "sampling_rate": int(number_of(rate, "sampling_rate"))}
