"""Translations as the hub has them: `translation: {"en": ..., "de": ...}`."""

from collections.abc import Mapping
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.data._values import as_object, text_of
from lora_ft.registry import FORMATS

OTHER_WAY = (
    "other languages or the other way: --set data.columns.prompt=translation.DE --set data.columns.completion=..."
)


class Translation(RowFormat):
    """A text in two languages, from the first to the second."""

    kind = "prompt"
    name = "translation"
    description = "translation: {first language: text, second language: text}, learnt from the first to the second."
    required = ("translation",)

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The first language as prompt, the second as completion."""
        texts = as_object(row.get("translation"), "translation")
        if not isinstance(texts, Mapping) or not texts:
            raise ValueError("column 'translation' must be an object with two languages")
        languages = list(texts)
        if not answered and len(languages) == 1:
            return {"prompt": text_of(texts, languages[0])}
        if len(languages) != 2:
            raise ValueError(f"{len(languages)} languages ({', '.join(languages)}), two are needed; {OTHER_WAY}")
        return {"prompt": text_of(texts, languages[0]), "completion": text_of(texts, languages[1])}


FORMATS.register(Translation())
