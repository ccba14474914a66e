"""Speech and what is said."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._values import absent, text_of
from lora_ft.registry import FORMATS

from ._media import NAMES, MediaFormat

ALIASES = {"audio": NAMES["audio"][1:], "text": ("sentence", "transcription", "transcript")}


class AudioText(MediaFormat):
    """Speech recognition."""

    kind = "audio_text"
    name = "audio_text"
    description = (
        "audio (or file_name, path): a path, bytes, or an array with sampling_rate; text (or sentence, transcription, "
        "transcript)."
    )
    required = ("audio", "text")
    answer = "text"
    aliases = ALIASES
    medium = "audio"

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The sound, and the text where there is one."""
        fields = {"audio": self.medium_of(row)}
        column = self.named("text", row) or "text"
        if not answered and absent(row.get(column)):
            return fields
        return {**fields, "text": text_of(row, column)}


FORMATS.register(AudioText())
