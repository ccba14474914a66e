"""One class for a sound, or any number of labels: keywords, speakers, events, languages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Sample
from lora_ft.registry import TASKS

from ._audio import QUIET, SoundOptions, check_sounds, cost, extractor_of, features, hear, short, sound_answer
from ._classes import ClassOptions, ClassTask, labels_of
from ._images import named


class AudioClassificationOptions(SoundOptions, ClassOptions):
    """Options of audio-classification."""


@dataclass(frozen=True)
class AudioClassification(ClassTask):
    """Sounds with classes."""

    options: AudioClassificationOptions = field(default_factory=AudioClassificationOptions)

    name = "audio-classification"
    hub_task = "audio-classification"
    description = "A sound gets one class, or any number of labels."
    auto_class = "AutoModelForAudioClassification"
    kinds = ("labelled_audio",)
    processor_class = "AutoFeatureExtractor"
    media = True

    def model_arguments(self) -> dict[str, Any]:
        """The labels, and no randomness of the model's own beside dropout."""
        return {**super().model_arguments(), **QUIET}

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse what takes no sound."""
        check_sounds(processor, self.options.augment)
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each row; a longer sound loses its end."""

        def encode(example: Example) -> Encoded:
            heard = hear(example, processor, options)
            if heard.cut and options.overlong == "error":
                raise ValueError(f"longer than {heard.limit:g} s; --set data.overlong=truncate cuts such sounds")
            if heard.cut and options.overlong == "drop":
                return Encoded((), f"dropped: longer than {heard.limit:g} s")
            answer, label = self.answer_of(example)
            positions = cost(processor, heard.samples)
            sample = Sample({**heard.inputs(), **answer}, positions, int("labels" in answer), example.where, label)
            done = f"truncated to {heard.limit:g} s" if heard.cut else ""
            return Encoded((sample,), ", ".join(n for n in (heard.note, done) if n))

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The file, its length and its label."""
        seconds = sample.inputs["samples"] / extractor_of(processor).sampling_rate
        return f"{sample.inputs['audio'].shown} ({seconds:.2f} s) [[{self.shown_answer(sample)}]]"

    def shown(self, example: Example) -> str:
        """Its path."""
        return named(example, "audio")

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """The model's features of the sounds, and labels where all samples have them."""
        return {**features(samples, processor, self.options.augment, draw), **labels_of(samples)}

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """Logits (B, classes)."""
        return sound_answer(model, {k: v for k, v in batch.items() if k != "labels"})

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """The first second of each sound."""
        return [features([short(s, processor)], processor, self.options.augment, 0) for s in samples]


TASKS.register(AudioClassification())
