"""Sentences as vectors: what belongs together lies close together."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from lora_ft.errors import DivergedError
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from ._base import Options, Outputs, TaskBase, padded, text_batch
from ._retrieval import joined, recall, same

ROLES = ("anchor", "positive", "negative")
MARKS = 2  # numbers that say which text it was, at the end of each embedding that `represent` gives
MARK_BASE = 2**24 - 1  # float32 holds every integer up to here; two of them tell 2.8e14 texts apart
JUDGED_TOGETHER = 64  # held-out rows among which a positive is looked for in the loss; the last ones may be fewer


class EmbeddingOptions(Options):
    """Options of sentence-embedding."""

    pooling: Literal["mean", "cls", "last"] = Field(
        "mean", description="Which token vectors make the sentence's: the mean of all, the first or the last."
    )
    normalize: bool = Field(True, description="Scale sentence vectors to length 1.")
    loss: Literal["contrastive", "triplet"] = Field(
        "contrastive",
        description="contrastive: find the positive among all positives and negatives of the step; triplet: the "
        "positive is nearer than the row's own negative by the margin.",
    )
    temperature: float = Field(0.05, gt=0, description="What similarities are divided by in the contrastive loss.")
    symmetric: bool = Field(False, description="Also find the anchor among all anchors of the step.")
    margin: float = Field(1.0, gt=0, description="Of the triplet loss, in Euclidean distance.")
    query_prefix: str = Field("", description="Put before each anchor, such as 'query: '.")
    passage_prefix: str = Field("", description="Put before each positive and negative, such as 'passage: '.")


@dataclass(frozen=True)
class SentenceEmbedding(TaskBase):
    """Encoders whose pooled token vectors are compared.

    `represent` gives each sample as (3, D + 2): anchor, positive and negative, each with two numbers that stand for its
    text, zeros where it is missing. They let `combine` know equal texts whatever dropout does to their embeddings.
    """

    options: EmbeddingOptions = field(default_factory=EmbeddingOptions)

    name = "sentence-embedding"
    hub_task = "sentence-similarity"
    description = "Vectors for sentences, from pairs or triplets: search, clustering, semantic similarity."
    auto_class = "AutoModel"
    peft_task_type = "FEATURE_EXTRACTION"
    kinds = ("pairs",)
    new_head = False
    whole_step = True

    def model_arguments(self) -> dict[str, Any]:
        """No pooler: nothing of the loss would reach it."""
        return {"add_pooling_layer": False}

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """The token ids of each text; labelled where there is a positive."""
        prefixes = dict(zip(ROLES, (self.options.query_prefix, *[self.options.passage_prefix] * 2), strict=True))

        def encode(example: Example) -> Encoded:
            texts = _texts(example.fields)
            if self.options.loss == "triplet" and "positive" in texts and "negative" not in texts:
                raise ValueError("the triplet loss needs a negative in every row")
            found = {r: _tokens(processor, prefixes[r] + text, options.max_length) for r, text in texts.items()}
            inputs: dict[str, Any] = {role: ids for role, (ids, _) in found.items()}
            length, outcome = sum(len(ids) for ids in inputs.values()), ""
            if any(cut for _, cut in found.values()):
                if options.overlong in ("drop", "error"):
                    over = "over max_length" if options.overlong == "error" else "dropped: longer than max_length"
                    return Encoded((), over)
                inputs["cut"], outcome = 1, "truncated"
            sample = Sample(inputs, length, int("positive" in inputs), example.where, source=example.source)
            return Encoded((sample,), outcome)

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The texts by role."""
        return "\n".join(f"{role}: {processor.decode(sample.inputs[role])}" for role in ROLES if role in sample.inputs)

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Anchors and passages, each padded on their own.

        Returns:
            input_ids, attention_mask (B, T) of the anchors; passage_ids, passage_mask (N, T') of all positives and
            negatives; places (B, 2), which of these are a sample's, -1 for none; marks (B, 3, 2) of the texts.
        """
        anchors = [Sample({"input_ids": s.inputs["anchor"]}, 0, 0, s.where) for s in samples]
        passages: list[list[int]] = []
        places = torch.full((len(samples), 2), -1)
        marks = torch.zeros(len(samples), 3, MARKS)
        for row, sample in enumerate(samples):
            for column, role in enumerate(ROLES):
                if role not in sample.inputs:
                    continue
                marks[row, column] = _marks(sample.inputs[role])
                if column:
                    places[row, column - 1] = len(passages)
                    passages.append(sample.inputs[role])
        batch: Batch = {**text_batch(anchors, processor), "places": places, "marks": marks}
        if passages:
            pad_id = processor.pad_token_id if processor.pad_token_id is not None else 0
            batch["passage_ids"] = padded(passages, pad_id)
            batch["passage_mask"] = padded([[1] * len(p) for p in passages], 0)
        return batch

    def represent(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, 3, D + 2): embeddings of anchor, positive and negative, and what tells their texts."""
        anchors = self._embed(model, batch["input_ids"], batch["attention_mask"])
        others = anchors.new_zeros(len(anchors), 2, anchors.shape[-1])
        if "passage_ids" in batch:
            found = self._embed(model, batch["passage_ids"], batch["passage_mask"])
            places = batch["places"]
            others = torch.where((places >= 0)[..., None], found[places.clamp_min(0)], others)
        return torch.cat([torch.cat([anchors[:, None], others], 1), batch["marks"].to(anchors.dtype)], -1)

    def _embed(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, T) -> (N, D) in float32."""
        hidden: Tensor = model(input_ids=ids, attention_mask=mask)[0]
        hidden = hidden[:, -ids.shape[1] :].float()  # without the virtual tokens of a prompt
        if self.options.pooling == "mean":
            weights = mask[..., None].float()
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        elif self.options.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        return functional.normalize(pooled, dim=-1) if self.options.normalize else pooled

    def combine(self, representations: Tensor) -> LossSum:
        """The loss over all samples (N, 3, D + 2) of a step; the count is their number.

        Contrastive: cross entropy of each anchor's own positive among all positives and negatives (InfoNCE; van den
        Oord et al. 2018, arXiv:1807.03748). A text that any row of the step calls a positive of the same anchor text is
        right too, and therefore no other candidate.
        """
        texts, marks = representations[..., :-MARKS], representations[..., -MARKS:].detach()
        anchor, positive, negative = texts.unbind(1)
        if self.options.loss == "triplet":
            total = functional.triplet_margin_loss(
                anchor, positive, negative, margin=self.options.margin, reduction="sum"
            )
            return LossSum(total, len(texts))
        anchors, positives = same(marks[:, 0], marks[:, 0]), same(marks[:, 1], marks[:, 1])
        negatives = same(marks[:, 1], marks[:, 2])
        diagonal = torch.eye(len(texts), dtype=torch.bool, device=texts.device)
        missing = ~marks[:, 2].any(-1)
        excluded = torch.cat([joined(anchors, positives) & ~diagonal, joined(anchors, negatives) | missing], 1)
        total = self._cross_entropy(anchor, torch.cat([positive, negative]), excluded)
        if self.options.symmetric:
            total = (total + self._cross_entropy(positive, anchor, joined(positives, anchors) & ~diagonal)) / 2
        return LossSum(total, len(texts))

    def _cross_entropy(self, given: Tensor, candidates: Tensor, excluded: Tensor) -> Tensor:
        """Sum over the rows of `given` (N, D), of which row i belongs to candidate i; `excluded` is (N, M)."""
        scores = (given @ candidates.T / self.options.temperature).masked_fill(excluded, float("-inf"))
        return functional.cross_entropy(scores, torch.arange(len(given), device=given.device), reduction="sum")

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss of the batch as if it were a whole step."""
        representations = self.represent(model, batch)
        kept = {} if torch.is_grad_enabled() else self.keep(representations, batch)
        found = self.combine(representations)
        return LossSum(found.total, found.count, outputs=kept)

    def answer(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `represent`."""
        return self.represent(model, batch)

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """The representations (B, 3, D + 2)."""
        return {"representation": answer.detach()}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Embeddings (B, D) of the anchors."""
        return self._embed(model, batch["input_ids"], batch["attention_mask"])

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """The anchors."""
        return [text_batch([Sample({"input_ids": s.inputs["anchor"]}, 0, 0, s.where)], processor) for s in samples]

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Loss over the rows in order, in steps of 64, and how often the positive is among the nearest k.

        For recall the candidates are the distinct positives of all rows but those of another row with the same anchor.
        The loss replaces the mean of micro-batches, which would depend on which rows share one.
        """
        found = torch.stack([o["representation"] for o in outputs])
        finite = found.flatten(1).isfinite().all(-1).tolist()
        if not all(finite):
            raise DivergedError(
                f"the embeddings of {finite.count(False)} of {len(finite)} rows are not finite numbers",
                where=samples[finite.index(False)].where,
                fix="a smaller learning rate, or --set train.dtype=float32",
            )
        steps = [self.combine(part) for part in torch.split(found, JUDGED_TOGETHER)]
        loss = float(torch.stack([s.total for s in steps]).double().sum()) / sum(s.count for s in steps)
        metrics, right = recall(found[..., :-MARKS], found[..., -MARKS:])
        return Judgement({"loss": loss, **metrics}, right)

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The similarity of anchor and positive where both are there, else the anchor's embedding in `details`."""
        for example, parts, answers in zip(examples, samples, outputs, strict=True):
            anchor, positive, negative = answers[0]["representation"][..., :-MARKS].unbind(0)
            text = _texts(example.fields)["anchor"]
            details: dict[str, Any] = {"embedding": anchor.tolist()}
            output = ""
            if "positive" in parts[0].inputs:
                details = {"similarity": float(anchor @ positive)}
                output = f"{details['similarity']:.4f}"
            if "negative" in parts[0].inputs:
                details["negative_similarity"] = float(anchor @ negative)
            yield Prediction(example.where, text, output, None, "cut" in parts[0].inputs, details)


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """Text by role; a row of plain text is an anchor."""
    given = {"anchor": fields["text"]} if "text" in fields else fields
    return {role: given[role] for role in ROLES if given.get(role) is not None}


def _tokens(processor: Any, text: str, limit: int) -> tuple[list[int], bool]:
    """Token ids of a text, and whether it lost its end."""
    ids = [*processor(text, verbose=False)["input_ids"]]
    if not ids:
        raise ValueError("a text gives no token")
    if len(ids) <= limit:
        return ids, False
    return [*processor(text, truncation=True, max_length=limit)["input_ids"]], True


def _marks(ids: Sequence[int]) -> Tensor:
    """Two numbers from 1 up that differ for different token ids."""
    digest = int.from_bytes(hashlib.blake2b(array("q", ids).tobytes(), digest_size=8).digest(), "little")
    return torch.tensor([1.0 + digest % MARK_BASE, 1.0 + digest // MARK_BASE % MARK_BASE])


TASKS.register(SentenceEmbedding())
