"""What speech recognition is, whichever way a model writes: texts, their rows, and how transcripts are judged."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Self

from pydantic import Field
from torch import nn

from lora_ft.errors import DataError, UsageError
from lora_ft.records import (
    Batch,
    Encoded,
    EncodeOptions,
    Example,
    Judgement,
    Prediction,
    PredictOptions,
    Sample,
    moved,
)

from ._audio import QUIET, Heard, SoundOptions, check_sounds, cost, features, hear
from ._base import IGNORE, TaskBase, padded
from ._generate import in_order
from ._images import named

METRICS = ("wer", "cer")


class SpeechOptions(SoundOptions):
    """Options of every kind of speech recognition."""

    normalise: bool = Field(
        True, description="Judge transcripts in lower case and without punctuation; what is trained on stays as it is."
    )


@dataclass(frozen=True)
class Speech(TaskBase):
    """A sound and its text. A subclass says what a text's token ids are, and writes the ids for a batch of sounds."""

    options: SpeechOptions = field(default_factory=SpeechOptions)

    kinds = ("audio_text",)
    overlong = "drop"
    processor_class = "AutoProcessor"
    media = True

    def text_ids(self, processor: Any, text: str) -> list[int]:
        """Token ids of a text, as they are trained on; raises ValueError for a text that cannot be learnt."""
        raise NotImplementedError

    def spelled(self, processor: Any, ids: Sequence[int], plain: bool) -> str:
        """The text of token ids, `plain` without special tokens."""
        return str(processor.tokenizer.decode(ids, skip_special_tokens=plain))

    def write(self, model: nn.Module, processor: Any, batch: Batch, most: int) -> list[list[int]]:
        """Token ids that the model writes for each row of a batch, at most `most` of them."""
        raise NotImplementedError

    def check_text(self, ids: Sequence[int], heard: Heard, options: EncodeOptions) -> str:
        """Why a row is dropped, "" where it is not; raises ValueError for a text that cannot be that of its sound."""
        raise NotImplementedError

    def configure(self, options: Mapping[str, Any]) -> Self:
        """Needs jiwer."""
        if find_spec("jiwer") is None:
            raise UsageError(f"{self.name} needs the package jiwer", fix="pip install 'lora-ft[audio]'")
        return super().configure(options)

    def model_arguments(self) -> dict[str, Any]:
        """No randomness of the model's own beside dropout."""
        return dict(QUIET)

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse a processor without sound or without letters."""
        check_sounds(processor, self.options.augment)
        if not hasattr(processor, "tokenizer"):
            raise UsageError(
                f"the model has no tokenizer ({type(processor).__name__}), so it cannot write",
                fix="a model that was trained to write, or one with vocab.json and tokenizer_config.json beside it",
            )
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each row; a sound that is too long is dropped with its text, of which no part would be right.

        Raises:
            UsageError: the recipe wants sounds cut.
        """
        if options.overlong.startswith("truncate"):
            raise UsageError(
                f"data.overlong: {options.overlong} would cut a sound and leave its text whole",
                fix="--set data.overlong=drop, or cut the rows at pauses",
            )

        def encode(example: Example) -> Encoded:
            heard = hear(example, processor, options)
            positions = cost(processor, heard.samples)
            text = text_of(example)
            if text is None:
                return Encoded((Sample(heard.inputs(), positions, 0, example.where),), heard.note)
            ids = self.text_ids(processor, text)
            why = f"longer than {heard.limit:g} s" if heard.cut else self.check_text(ids, heard, options)
            if why and options.overlong == "error":
                raise ValueError(f"{why}; --set data.overlong=drop leaves such rows out")
            if why:
                return Encoded((), f"dropped: {why}")
            inputs = {**heard.inputs(), "labels": ids}
            return Encoded((Sample(inputs, positions + len(ids), len(ids), example.where),), heard.note)

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The sound's name and length, and its text."""
        rate = processor.feature_extractor.sampling_rate
        text = self.spelled(processor, sample.inputs.get("labels", []), False)
        return f"{sample.inputs['audio'].shown} ({sample.inputs['samples'] / rate:.2f} s) [[{text}]]"

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """The model's features of the sounds; labels (B, T), -100 where the text has ended."""
        batch = features(samples, processor, self.options.augment, draw)
        if all("labels" in s.inputs for s in samples):
            batch["labels"] = padded([s.inputs["labels"] for s in samples], IGNORE)
        return batch

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """Transcripts; a sound that is too long is heard to its limit."""
        examples = list(examples)
        samples = [self._asked(e, processor, options.encode) for e in examples]
        for index, ids in in_order(self._written(model, processor, samples, options)):
            e, text = examples[index], self.spelled(processor, ids, True).strip()
            found = samples[index].inputs
            seconds = round(found["samples"] / processor.feature_extractor.sampling_rate, 3)
            yield Prediction(e.where, named(e, "audio"), text, text_of(e), "cut" in found, {"seconds": seconds})

    def _written(
        self, model: nn.Module, processor: Any, samples: Sequence[Sample], options: PredictOptions
    ) -> Iterator[tuple[int, list[int]]]:
        device = next(model.parameters()).device
        order = sorted(range(len(samples)), key=lambda i: samples[i].length)
        for start in range(0, len(order), options.batch_size):
            chosen = order[start : start + options.batch_size]
            batch = moved(features([samples[i] for i in chosen], processor, self.options.augment, 0), device)
            yield from zip(chosen, self.write(model, processor, batch, options.max_new_tokens), strict=True)

    def _asked(self, example: Example, processor: Any, options: EncodeOptions) -> Sample:
        try:
            heard = hear(example, processor, options)
        except ValueError as error:
            raise DataError(str(error), where=example.where) from error
        return Sample(heard.inputs(), cost(processor, heard.samples), 0, example.where)

    def judge(self, predictions: Sequence[Prediction]) -> Judgement:
        """Word and character error rate over all rows with a text, and exact match."""
        return judge_transcripts(predictions, self.options.normalise)


def text_of(example: Example) -> str | None:
    """The row's text with single spaces; None where it has none.

    Raises:
        ValueError: it is empty.
    """
    text = example.fields.get("text")
    if text is None:
        return None
    text = " ".join(str(text).split())
    if not text:
        raise ValueError("the row's text is empty")
    return text


def judge_transcripts(predictions: Sequence[Prediction], normalise: bool) -> Judgement:
    """wer and cer: edits in all rows, by the words or characters of all references; exact_match of whole texts.

    Args:
        predictions: those without a reference do not count.
        normalise: whether both are put into lower case without punctuation before.
    """
    import jiwer

    form = normalised if normalise else (lambda text: " ".join(text.split()))
    pairs = [(form(p.reference), form(p.output)) for p in predictions if p.reference is not None]
    wanted, written = [w for w, _ in pairs], [g for _, g in pairs]
    right = [w == g for w, g in pairs]
    if not any(wanted):
        return Judgement({}, right)
    found = {"wer": float(jiwer.wer(wanted, written)), "cer": float(jiwer.cer(wanted, written))}
    return Judgement({**found, "exact_match": sum(right) / len(right)}, right)


def normalised(text: str) -> str:
    """Lower case, single spaces, no punctuation but apostrophes inside of words."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    kept = "".join(" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join(w for word in kept.split() if (w := word.strip("'")))
