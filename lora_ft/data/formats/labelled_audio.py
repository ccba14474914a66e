"""A sound and its class, or its several classes."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._label_value import LABEL_NAMES, label_fields
from lora_ft.registry import FORMATS

from ._media import NAMES, MediaFormat

ALIASES = {"audio": NAMES["audio"][1:], "label": (*LABEL_NAMES, "target", "y")}


class LabelledAudio(MediaFormat):
    """Audio classification; also what a folder with a subfolder for each class becomes."""

    kind = "labelled_audio"
    name = "labelled_audio"
    description = (
        "audio (or file_name, path): a path, bytes, or an array with sampling_rate; label: a class; labels: a list or "
        "'a|b'. Or CLASS/FILE folders."
    )
    required = ("audio", "label")
    answer = "label"
    aliases = ALIASES
    medium = "audio"

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The sound, and the label where there is one."""
        return {"audio": self.medium_of(row), **label_fields(row, self.named("label", row), answered)}


FORMATS.register(LabelledAudio())
