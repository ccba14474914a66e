"""Text to text with an encoder and a decoder: translation, summarisation, rewriting."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import nn

from lora_ft.errors import UsageError
from lora_ft.records import (
    Batch,
    Encoded,
    EncodeOptions,
    Example,
    Judgement,
    LossSum,
    Prediction,
    PredictOptions,
    Sample,
)
from lora_ft.registry import TASKS
from lora_ft_adapters import AdapterError
from lora_ft_adapters.fast.causal import labelled_loss

from ._base import IGNORE, Options, TaskBase, padded, text_batch
from ._decoder import decoder_inputs, plain_model, without_bias
from ._generate import generate, in_order
from ._generation_metrics import AUTO, judge_written, require_metrics
from ._languages import check_languages, language_id, set_languages
from ._tokens import special_ids

PROBE_TOKENS = 64


class Seq2SeqOptions(Options):
    """Options of seq2seq-lm."""

    source_prefix: str = Field("", description="Put before every source, such as 'translate English to German: '.")
    max_target_length: int | None = Field(None, ge=2, description="Most tokens in a target; default data.max_length.")
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all tokens.")
    num_beams: int = Field(1, ge=1, description="Beams when answers are written; 1 is greedy.")
    metrics: Literal["auto"] | tuple[Literal["exact_match", "bleu", "chrf", "rouge_l"], ...] = Field(
        "auto", description="How written answers are judged; auto: exact_match, bleu and chrf."
    )
    bleu_tokenize: Literal["13a", "intl", "char", "zh", "none"] = Field(
        "13a", description="sacrebleu's tokenizer for BLEU: zh for Chinese, char for other scripts without spaces."
    )
    src_lang: str | None = Field(None, description="Language code of the sources, for NLLB, mBART and M2M100.")
    tgt_lang: str | None = Field(None, description="Language code of the targets, for the same models.")

    @field_validator("metrics", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if value != "auto" and not isinstance(value, list | tuple):
            raise ValueError("must be auto or a list of exact_match, bleu, chrf, rouge_l")
        return value


@dataclass(frozen=True)
class Seq2SeqLM(TaskBase):
    """Models with an encoder that reads the source and a decoder that writes the target; loss on the target."""

    options: Seq2SeqOptions = field(default_factory=Seq2SeqOptions)

    name = "seq2seq-lm"
    hub_task = "text2text-generation"
    description = "Translation, summarisation or rewriting with a model that reads a source and writes a target."
    auto_class = "AutoModelForSeq2SeqLM"
    peft_task_type = "SEQ_2_SEQ_LM"
    kinds = ("prompt",)
    new_head = False
    overlong = "truncate_prompt"
    perplexity = True

    def configure(self, options: Mapping[str, Any]) -> Self:
        """Needs the packages of its metrics."""
        task = super().configure(options)
        require_metrics(task._metrics())
        return task

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse a tokenizer without end or padding, or one whose languages are not said."""
        if _end(processor) is None:
            raise UsageError("the tokenizer has no end token, so the model could never learn to stop")
        if processor.pad_token_id is None:
            raise UsageError("the tokenizer has no padding token, and sources differ in length")
        check_languages(processor, self.options.src_lang, self.options.tgt_lang)
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """Source with its prefix; target with its end token, which is never cut away.

        A longer source loses its end. A longer target loses its end with `overlong: truncate` and is dropped with
        truncate_prompt.
        """
        self._speak(processor)
        ends, close = special_ids(processor), [_end(processor)]
        most = self.options.max_target_length or options.max_length

        def encode(example: Example) -> Encoded:
            source, cut = self._source(processor, example, options.max_length)
            inputs, outcome = {"input_ids": source}, "truncated" if cut else ""
            if "completion" in example.fields:
                target = self._target(processor, example.fields["completion"])
                target += [] if target and target[-1] in ends else close
                if len(target) > most:
                    outcome = "target truncated" if options.overlong == "truncate" else "dropped: target too long"
                    target = _shortened(target, most, ends)
                inputs["labels"] = target
            if outcome and options.overlong == "error":
                return Encoded((), "over max_length")
            if outcome.startswith("dropped") or (outcome and options.overlong == "drop"):
                what = "max_target_length" if outcome.startswith("dropped: target") else "max_length"
                return Encoded((), f"dropped: longer than {what}")
            labelled = len(inputs.get("labels", ()))
            return Encoded((Sample(inputs, len(source) + labelled, labelled, example.where),), outcome)

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The source, and the target in [[ ]]."""
        source = processor.decode(sample.inputs["input_ids"], clean_up_tokenization_spaces=False)
        target = processor.decode(sample.inputs.get("labels", []), clean_up_tokenization_spaces=False)
        return f"{source} [[{target}]]" if target else str(source)

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """input_ids, attention_mask (B, S); labels (B, T), -100 where the target has ended."""
        batch = text_batch(samples, processor)
        if all("labels" in s.inputs for s in samples):
            batch["labels"] = padded([s.inputs["labels"] for s in samples], IGNORE)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The model's own loss; with label smoothing the cross entropy of its logits."""
        labels = batch["labels"]
        out = model(**batch, use_cache=False)
        logits = out.logits[:, -labels.shape[1] :]  # without virtual tokens before the target
        count = int((labels != IGNORE).sum())
        smoothing = self.options.label_smoothing_factor
        total = out.loss * count
        if smoothing:
            total = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", label_smoothing=smoothing
            )
        right = ((logits.detach().argmax(-1) == labels) & (labels != IGNORE)).sum()
        return LossSum(total, count, {"token_accuracy": right})

    def fast_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The vocabulary head at target tokens only.

        The shared path predicts position t from t - 1, so the decoder reads its start token and the whole target,
        and the labels stand one position later.
        """
        if self.options.label_smoothing_factor:
            raise AdapterError("label smoothing needs all logits")
        base = plain_model(model)
        labels = nn.functional.pad(batch["labels"], (1, 0), value=IGNORE)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        inputs["decoder_input_ids"] = decoder_inputs(base, nn.functional.pad(batch["labels"], (0, 1), value=IGNORE))
        with without_bias(base):
            result = labelled_loss(model, inputs, labels)
        return LossSum(result.loss_sum, result.count, {"token_accuracy": result.correct})

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """The decoder after the batch's decoder_input_ids, or after the start token alone."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if "decoder_input_ids" not in inputs:
            none = torch.full((len(inputs["input_ids"]), 1), IGNORE, device=inputs["input_ids"].device)
            inputs["decoder_input_ids"] = decoder_inputs(plain_model(model), none)
        return model(**inputs, use_cache=False)

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """The first tokens of each source, and those of its target for the decoder to read."""
        found: list[Batch] = []
        for s in samples:
            target = s.inputs.get("labels", [processor.pad_token_id])[:PROBE_TOKENS]
            source = s.inputs["input_ids"][:PROBE_TOKENS]
            found.append({"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([target])})
        return found

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """Greedy or beam answers; the row's completion is the reference."""
        examples = list(examples)
        self._speak(processor)
        sources = [self._source(processor, e, options.encode.max_length) for e in examples]
        settings = self.generation_defaults(model, processor)
        ends = settings.pop("eos_token_id")
        settings = {"num_beams": self.options.num_beams, **{k: v for k, v in settings.items() if k != "pad_token_id"}}
        written = generate(model, processor, [ids for ids, _ in sources], options, ends, settings)
        for index, new in in_order(written):
            e = examples[index]
            output = processor.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            asked = self.options.source_prefix + e.fields["prompt"]
            yield Prediction(e.where, asked, output, e.fields.get("completion"), sources[index][1])

    def judge(self, predictions: Sequence[Prediction]) -> Judgement:
        """The metrics of the options over all rows with a reference."""
        return judge_written(predictions, self._metrics(), self.options.bleu_tokenize)

    def reference_lengths(self, processor: Any, examples: Sequence[Example]) -> list[int | None]:
        """Tokens of each target."""
        self._speak(processor)
        targets = [e.fields.get("completion") for e in examples]
        return [None if t is None else len(self._target(processor, t)) for t in targets]

    def generation_defaults(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        """Where a target starts and ends, padding, and the language it is in."""
        config, own = plain_model(model).config, getattr(model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        start = getattr(own, "decoder_start_token_id", None)
        start = getattr(config, "decoder_start_token_id", None) if start is None else start
        found: dict[str, Any] = {
            "eos_token_id": sorted({_end(processor), *(ends if isinstance(ends, list) else [ends])} - {None}),
            "pad_token_id": processor.pad_token_id,
            "min_length": 0,  # summarisers come with a least length for the texts that they were trained on
        }
        if self.options.tgt_lang:
            self._speak(processor)
            language = language_id(processor, self.options.tgt_lang)
            target = torch.tensor([self._target(processor, "a")], device=next(model.parameters()).device)
            if int(decoder_inputs(plain_model(model), target)[0, 0]) == language:  # mBART: the language is the start
                start = language
            else:
                found["forced_bos_token_id"] = language
        return found if start is None else {**found, "decoder_start_token_id": start}

    def _metrics(self) -> Sequence[str]:
        return AUTO if self.options.metrics == "auto" else self.options.metrics

    def _speak(self, processor: Any) -> None:
        set_languages(processor, self.options.src_lang, self.options.tgt_lang)

    def _source(self, processor: Any, example: Example, limit: int) -> tuple[list[int], bool]:
        """Token ids of a source, and whether it lost its end; special tokens at the end stay."""
        text = self.options.source_prefix + example.fields["prompt"]
        ids = list(processor(text)["input_ids"])
        if len(ids) <= limit:
            return ids, False
        return list(processor(text, truncation=True, max_length=limit)["input_ids"]), True

    def _target(self, processor: Any, text: str) -> list[int]:
        return list(processor(text_target=text)["input_ids"])


def _end(processor: Any) -> Any:
    """The id of the token that ends a target, None if there is none; BERT-like tokenizers call it the separator."""
    return processor.eos_token_id if processor.eos_token_id is not None else processor.sep_token_id


def _shortened(target: list[int], most: int, ends: set[int]) -> list[int]:
    """The first tokens and all special tokens at the end."""
    tail = next(n for n, t in enumerate([*reversed(target), -1]) if t not in ends)
    return [*target[: max(0, most - tail)], *target[len(target) - tail :]]


TASKS.register(Seq2SeqLM())
