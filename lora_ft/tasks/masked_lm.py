"""Guessing masked tokens: how encoders learn from unlabelled text."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import DataError, Problem, UsageError
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, LossSum, Prediction, PredictOptions, Sample
from lora_ft.registry import TASKS
from lora_ft_adapters.fast.head import HeadResult
from lora_ft_adapters.fast.masked import masked_loss, plain_loss

from ._base import IGNORE, Options, Outputs, TaskBase, text_batch
from ._tokens import special_ids

# Of the chosen tokens, BERT (Devlin et al. 2019) replaces 80 % by the mask, 10 % by a random token, and keeps 10 %.
MASKED, RANDOM = 0.8, 0.1


class MaskedOptions(Options):
    """Options of masked-lm."""

    mlm_probability: float = Field(0.15, gt=0, lt=1, description="Share of the tokens that are to be guessed.")
    whole_word_mask: bool = Field(False, description="Whether all tokens of a word are chosen together.")


@dataclass(frozen=True)
class MaskedLM(TaskBase):
    """Encoders with a vocabulary head. Masks are drawn anew each epoch, and are always the same in judging.

    Text longer than max_length becomes several samples, each with the tokenizer's special tokens around it. In text
    that holds mask tokens already, these are what is to be found out: such rows are for prediction.
    """

    options: MaskedOptions = field(default_factory=MaskedOptions)

    name = "masked-lm"
    hub_task = "fill-mask"
    description = "Guess masked tokens of raw text: continued pretraining of encoders, and filling in blanks."
    auto_class = "AutoModelForMaskedLM"
    kinds = ("text",)
    perplexity = True
    fast_note = "head at masked tokens only"

    def check_processor(self, processor: Any) -> list[str]:
        """It must have a mask token and, for whole words, know what a word is."""
        if processor.mask_token_id is None:
            raise UsageError(
                "the tokenizer has no mask token", why="this base was not trained with masks", fix="task: causal-lm"
            )
        if self.options.whole_word_mask:
            words = processor("a b").word_ids() if processor.is_fast else []
            if len({w for w in words if w is not None}) != 2:
                raise UsageError("this tokenizer does not say where words are", where="task.whole_word_mask")
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """Pieces of at most `max_length` tokens; those of a text with mask tokens carry no label."""
        special = special_ids(processor)
        before, after = _frame(processor)
        room = options.max_length - len(before) - len(after)
        if room < 1:
            raise UsageError(f"data.max_length: {options.max_length} leaves no room for text", fix="512 is usual")

        def encode(example: Example) -> Encoded:
            out = processor(example.fields["text"], add_special_tokens=False, verbose=False)
            ids = [*out["input_ids"]]
            blanks = processor.mask_token_id in ids
            found = out.word_ids() if self.options.whole_word_mask else range(len(ids))
            words = [-1 if blanks or i in special or w is None else w for i, w in zip(ids, found, strict=True)]
            if len(ids) > room and options.overlong in ("drop", "error"):
                too_long = options.overlong == "error"
                return Encoded((), "over max_length" if too_long else "dropped: longer than max_length")
            cuts = [slice(start, start + room) for start in range(0, len(ids), room)]
            if len(cuts) > 1 and len(ids[cuts[-1]]) == 1 and not blanks:
                cuts.pop()  # a token on its own teaches nothing
            samples = [
                self._sample([*before, *ids[c], *after], _framed(words[c], before, after), example) for c in cuts
            ]
            outcome = "cut into pieces" if len(cuts) > 1 else ""
            return Encoded(tuple(samples), "has mask tokens: for prediction only" if blanks else outcome)

        return encode

    def _sample(self, ids: list[int], words: list[int], example: Example) -> Sample:
        free = sum(w >= 0 for w in words)
        labelled = max(1, round(free * self.options.mlm_probability)) if free else 0
        return Sample({"input_ids": ids, "words": words}, len(ids), labelled, example.where, source=example.source)

    def show(self, sample: Sample, processor: Any) -> str:
        """The sample's tokens; in [[ ]] those that are to be guessed in judging."""
        chosen = self._chosen(sample, _generator(sample, 0))
        parts = []
        for token, hidden in zip(sample.inputs["input_ids"], chosen.tolist(), strict=True):
            text = processor.convert_ids_to_tokens(token)
            parts.append(f"[[{text}]]" if hidden else text)
        return " ".join(parts)

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """input_ids, attention_mask and, where nothing was masked before, labels (B, T), padded on the right."""
        batch = text_batch(samples, processor)
        if not all(s.labelled for s in samples):
            return batch
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for row, sample in enumerate(samples):
            generator = _generator(sample, draw)
            chosen = self._chosen(sample, generator)
            ids = batch["input_ids"][row, : sample.length]
            labels[row, : sample.length][chosen] = ids[chosen]
            fate = torch.rand(sample.length, generator=generator)
            other = torch.randint(len(processor), (sample.length,), generator=generator)
            ids[chosen & (fate < MASKED)] = processor.mask_token_id
            swapped = chosen & (fate >= MASKED) & (fate < MASKED + RANDOM)
            ids[swapped] = other[swapped]
        return {**batch, "labels": labels}

    def _chosen(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """(T,) which tokens are to be guessed: each word with `mlm_probability`, and at least one."""
        words = torch.tensor(sample.inputs["words"])
        if not sample.labelled:
            return torch.zeros_like(words, dtype=torch.bool)
        names, at = torch.unique(words, return_inverse=True)
        chance = torch.rand(len(names), generator=generator)
        chance[names < 0] = 1.0
        return ((chance < self.options.mlm_probability) | (chance == chance.min()))[at]

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The model's own loss."""
        return _sum(plain_loss(model, _inputs(batch), batch["labels"]))

    def fast_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The same with the vocabulary head at masked positions only."""
        return _sum(masked_loss(model, _inputs(batch), batch["labels"]))

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """The likeliest token of each position (B, T)."""
        return {"best": answer.logits[:, -batch["input_ids"].shape[1] :].argmax(-1)}

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """The masked samples."""
        return [_inputs(self.collate([s], processor)) for s in samples]

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """The text with its mask tokens filled in."""
        examples = list(examples)
        mask = str(processor.mask_token)
        problems = [Problem("no mask token in this row", e.where) for e in examples if mask not in e.fields["text"]]
        if problems:
            raise DataError.collect(
                problems,
                title=f"{len(problems)} of {len(examples)} rows have no mask token",
                fix=f"put {mask} where a token is to be guessed",
            )
        return super().predict(model, processor, examples, options)

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """Mask tokens replaced by the likeliest tokens, which `details` lists."""
        before, after = _frame(processor)
        for example, parts, answers in zip(examples, samples, outputs, strict=True):
            ids: list[int] = []
            filled: list[int] = []
            for sample, answer in zip(parts, answers, strict=True):
                given = sample.inputs["input_ids"]
                for i in range(len(before), sample.length - len(after)):
                    blank = given[i] == processor.mask_token_id
                    ids.append(int(answer["best"][i]) if blank else given[i])
                    if blank:
                        filled.append(ids[-1])
            text = processor.decode(ids, skip_special_tokens=True)
            words = [processor.decode([i]).strip() for i in filled]
            yield Prediction(example.where, example.fields["text"], text, None, details={"filled": words})


def _generator(sample: Sample, draw: int) -> torch.Generator:
    """Seeded by the draw and the sample's own tokens, so that nothing else about a run changes its masks."""
    digest = hashlib.blake2b(array("q", sample.inputs["input_ids"]).tobytes(), digest_size=8, key=str(draw).encode())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)


def _frame(processor: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    bare = processor("a", add_special_tokens=False)["input_ids"]
    whole = [*processor("a")["input_ids"]]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _framed(words: list[int], before: list[int], after: list[int]) -> list[int]:
    return [*([-1] * len(before)), *words, *([-1] * len(after))]


def _inputs(batch: Batch) -> Batch:
    return {k: v for k, v in batch.items() if k != "labels"}


def _sum(result: HeadResult) -> LossSum:
    return LossSum(result.loss_sum, result.count, {"token_accuracy": result.correct})


TASKS.register(MaskedLM())
