"""Speech to text with an encoder that hears and a decoder that writes (Whisper)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import UsageError, did_you_mean
from lora_ft.records import Batch, EncodeOptions, Example, LossSum, Sample
from lora_ft.registry import TASKS

from ._audio import Heard, features, short
from ._base import IGNORE, in_dtype_of
from ._decoder import decoder_inputs, plain_model
from ._speech import Speech, SpeechOptions, text_of

MOST_TOKENS = 448  # positions of every Whisper's decoder
PROBES = 1  # Whisper's spectrogram is always 30 s wide


class RecognitionOptions(SpeechOptions):
    """Options of speech-recognition."""

    language: str | None = Field(None, description="Language of the texts, such as en, for a model of several.")
    task: Literal["transcribe", "translate"] | None = Field(
        None, description="transcribe, or translate into English; default transcribe where a language is given."
    )
    num_beams: int = Field(1, ge=1, description="Beams when transcripts are written; 1 is greedy.")
    suppress_tokens: bool = Field(
        True, description="Never write the tokens that the model's own generation settings rule out, such as brackets."
    )


@dataclass(frozen=True)
class SpeechRecognition(Speech):
    """Loss on the tokens of the text, those of its language and task included, as Whisper was trained."""

    options: RecognitionOptions = field(default_factory=RecognitionOptions)

    name = "speech-recognition"
    hub_task = "automatic-speech-recognition"
    description = "Speech to text with a model that hears with an encoder and writes with a decoder, such as Whisper."
    auto_class = "AutoModelForSpeechSeq2Seq"
    new_head = False
    perplexity = True

    def configure(self, options: Mapping[str, Any]) -> Self:
        """A task without a language says nothing."""
        found = super().configure(options)
        if found.options.task is not None and found.options.language is None:
            raise UsageError("task.task needs task.language", fix="--set task.language=en")
        return found

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse a tokenizer without an end, and a language that it does not know."""
        super().check_processor(processor)
        tokenizer = processor.tokenizer
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end token, so the model could never learn to stop")
        speaks = hasattr(tokenizer, "set_prefix_tokens")
        if self.options.language is None:
            return ["task.language is not set: a model of several languages learns better with it"] if speaks else []
        if not speaks:
            raise UsageError("task.language: this model has no languages to choose from", fix="leave it out")
        self._check_language(tokenizer)
        return []

    def text_ids(self, processor: Any, text: str) -> list[int]:
        """Language, task and text, and the end; the decoder's start token is no label."""
        self._speak(processor)
        ids = list(processor.tokenizer(text_target=text)["input_ids"])
        tokenizer = processor.tokenizer
        start = getattr(tokenizer, "prefix_tokens", [tokenizer.bos_token_id])[0]
        ids = ids[1:] if ids and ids[0] == start else ids
        return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]

    def check_text(self, ids: Sequence[int], heard: Heard, options: EncodeOptions) -> str:
        """A decoder has so many positions."""
        most = min(options.max_length, MOST_TOKENS)
        return f"text longer than {most} tokens" if len(ids) > most else ""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The model's own loss."""
        labels = batch["labels"]
        out = model(**in_dtype_of(model, batch), use_cache=False)
        count = int((labels != IGNORE).sum())
        right = ((out.logits.detach().argmax(-1) == labels) & (labels != IGNORE)).sum()
        return LossSum(out.loss.float() * count, count, {"token_accuracy": right})

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """The decoder after the batch's decoder_input_ids, or after the start token alone."""
        inputs = {k: v for k, v in in_dtype_of(model, batch).items() if k != "labels"}
        if "decoder_input_ids" not in inputs:
            heard = next(iter(inputs.values()))
            none = torch.full((len(heard), 1), IGNORE, device=heard.device)
            inputs["decoder_input_ids"] = decoder_inputs(plain_model(model), none)
        return model(**inputs, use_cache=False)

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """The first second of a sound, and the tokens of its text for the decoder to read."""
        found: list[Batch] = []
        for s in samples[:PROBES]:
            target = s.inputs.get("labels", [processor.tokenizer.eos_token_id])
            heard = features([short(s, processor)], processor, self.options.augment, 0)
            found.append({**heard, "decoder_input_ids": torch.tensor([target])})
        return found

    def write(self, model: nn.Module, processor: Any, batch: Batch, most: int) -> list[list[int]]:
        """Greedy or beam search after the start, language and task that training put before each text."""
        from transformers import GenerationMixin

        base, tokenizer = plain_model(model), processor.tokenizer
        start = base.generation_config.decoder_start_token_id or base.config.decoder_start_token_id
        given = [start, *self._prefix(processor)]
        batch = in_dtype_of(model, batch)
        heard = next(iter(batch.values()))
        room = getattr(base.config, "max_target_positions", MOST_TOKENS) - len(given)
        settings = {} if self.options.suppress_tokens else {"suppress_tokens": None, "begin_suppress_tokens": None}
        # Whisper's own `generate` would detect the language again and cut what it hears into parts.
        with torch.inference_mode():
            out: Tensor = GenerationMixin.generate(
                base, **batch, decoder_input_ids=torch.tensor([given] * len(heard), device=heard.device),
                max_new_tokens=min(most, room), max_length=None, do_sample=False, num_beams=self.options.num_beams,
                temperature=None, top_p=None, top_k=None, forced_decoder_ids=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, **settings,
            )  # type: ignore[assignment]  # fmt: skip
        return [row[len(given) :].tolist() for row in out]

    def reference_lengths(self, processor: Any, examples: Sequence[Example]) -> list[int | None]:
        """Tokens of each text."""
        texts = [text_of(e) for e in examples]
        return [None if t is None else len(self.text_ids(processor, t)) for t in texts]

    def generation_defaults(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        """No forced tokens: Transformers takes language and task instead."""
        found: dict[str, Any] = {"forced_decoder_ids": None}
        if not self.options.suppress_tokens:
            found |= {"suppress_tokens": None, "begin_suppress_tokens": None}
        return found

    def _prefix(self, processor: Any) -> list[int]:
        """Token ids between the start and the text."""
        self._speak(processor)
        return list(getattr(processor.tokenizer, "prefix_tokens", [None]))[1:]

    def _speak(self, processor: Any) -> None:
        if self.options.language is not None:
            task = self.options.task or "transcribe"
            processor.tokenizer.set_prefix_tokens(language=self.options.language, task=task, predict_timestamps=False)

    def _check_language(self, tokenizer: Any) -> None:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        name = (self.options.language or "").lower()
        if name not in TO_LANGUAGE_CODE and name not in TO_LANGUAGE_CODE.values():
            known = sorted({*TO_LANGUAGE_CODE, *TO_LANGUAGE_CODE.values()})
            raise UsageError(f"task.language: {name!r} is not known; {did_you_mean(name, known)}")
        token = f"<|{TO_LANGUAGE_CODE.get(name, name)}|>"
        if token not in tokenizer.get_vocab():
            raise UsageError(f"task.language: this model has no token {token}", fix="leave it out")


TASKS.register(SpeechRecognition())
