"""One class for a text or a pair of texts, or any number of labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Sample
from lora_ft.registry import TASKS

from ._classes import ClassTask
from ._labelled import encode_text, labelled_batch, shown_text


@dataclass(frozen=True)
class TextClassification(ClassTask):
    """Texts and pairs of texts with classes."""

    name = "text-classification"
    hub_task = "text-classification"
    description = "A text, or a pair of texts, gets one class, or any number of labels."
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    kinds = ("labelled",)

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each row."""

        def encode(example: Example) -> Encoded:
            return encode_text(example, processor, options, *self.answer_of(example))

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The text and its label."""
        text = processor.decode(list(sample.inputs["input_ids"]), clean_up_tokenization_spaces=False)
        return f"{text} [[{self.shown_answer(sample)}]]"

    def shown(self, example: Example) -> str:
        """Its text."""
        return shown_text(example)

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Padded texts; labels (B,) of ids, or (B, labels) of 0 and 1."""
        return labelled_batch(samples, processor)


TASKS.register(TextClassification())
