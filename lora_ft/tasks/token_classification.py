"""A tag for each word: names, parts of speech, anything that is marked word by word."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import DataError
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from ._base import IGNORE, Outputs, TaskBase, padded, text_batch
from ._labels import LabelOptions, class_weights, label_arguments, label_ids, label_name, learn_labels, values_of
from ._spans import OUTSIDE, inside_of, look_like_spans, spans_of
from ._words import NO_TOKEN, Piece, WordTokenizer


class TokenOptions(LabelOptions):
    """Options of token-classification."""

    label_all_tokens: bool = Field(
        False, description="Learn the tag from every token of a word, not from the first only."
    )
    scheme: Literal["auto", "spans", "plain"] = Field(
        "auto",
        description="spans: tags mark spans (BIO, IOB, BIOES, BILOU, BMES) and are judged by them; plain: each word's "
        "tag is judged; auto: spans where all tags look like it.",
    )


@dataclass(frozen=True)
class TokenClassification(TaskBase):
    """Words with tags. A long row is cut between words, in training and prediction, so no word is lost.

    Attributes:
        labels: tags in the order of their ids.
        weights: of each tag in the loss; () when all weigh the same.
        scheme: spans or plain.
        filler: the tag of words that give no token.
    """

    options: TokenOptions = field(default_factory=TokenOptions)
    labels: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    scheme: str = "plain"
    filler: str = OUTSIDE

    name = "token-classification"
    hub_task = "token-classification"
    description = "Each word gets a tag: named entities, parts of speech."
    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"
    kinds = ("tokens",)

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> "TokenClassification":
        """The tags, what they mark, and what each weighs."""
        train, held = values_of(examples, tags_of), values_of(held_out, tags_of)
        labels = learn_labels(train, held, self.options.labels)
        counts = Counter(tag for tags, _ in train for tag in tags)
        scheme = self.options.scheme
        if scheme == "auto":
            scheme = "spans" if look_like_spans(labels) else "plain"
        elif scheme == "spans" and not look_like_spans(labels):
            strange = next((t for t in labels if t != OUTSIDE and not look_like_spans([t])), OUTSIDE)
            raise DataError(f"task.scheme is spans, but the tag {strange!r} marks none", fix="--set task.scheme=plain")
        return replace(
            self,
            labels=labels,
            weights=class_weights(self.options.class_weights, labels, counts),
            scheme=scheme,
            filler=OUTSIDE if OUTSIDE in labels else max(sorted(counts), key=counts.__getitem__),
        )

    def model_arguments(self) -> dict[str, Any]:
        """The tags both ways."""
        return label_arguments(self.labels)

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """A sample for each piece of a row; the label is at the first token of a word."""
        tokenizer = WordTokenizer(processor)

        def encode(example: Example) -> Encoded:
            words = words_of(example)
            ids = None if example.fields.get("tags") is None else label_ids(tags_of(example), self.labels)
            pieces = tokenizer.pieces(words, options.max_length)
            cut = any(p.cut for p in pieces)
            if (len(pieces) > 1 or cut) and options.overlong in ("drop", "error"):
                return Encoded(
                    (), "over max_length" if options.overlong == "error" else "dropped: longer than max_length"
                )
            samples, done = [], 0
            for piece in pieces:
                tags = None if ids is None else ids[done : done + len(piece.first)]
                samples.append(self._sample(piece, tags, example.where))
                done += len(piece.first)
            outcome = "truncated: a word is longer than max_length" if cut else ""
            return Encoded(tuple(samples), outcome or ("cut into pieces" if len(pieces) > 1 else ""))

        return encode

    def _sample(self, piece: Piece, tags: Sequence[int] | None, where: str) -> Sample:
        """`words`: position of each word's first token; `tags`: each word's id; `labels`: each token's id."""
        inputs: dict[str, Any] = {"input_ids": piece.ids, "words": piece.first}
        if piece.types:
            inputs["token_type_ids"] = piece.types
        if piece.cut:
            inputs["cut"] = 1
        if tags is None:
            return Sample(inputs, len(piece.ids), 0, where)
        labels = [IGNORE] * len(piece.ids)
        for position, count, tag in zip(piece.first, piece.counts, tags, strict=True):
            if count:
                labels[position] = tag
                if self.options.label_all_tokens:
                    labels[position + 1 : position + count] = [self._inside(tag)] * (count - 1)
        return Sample(
            {**inputs, "labels": labels, "tags": list(tags)}, len(piece.ids), sum(x != IGNORE for x in labels), where
        )

    def _inside(self, tag: int) -> int:
        """The tag of a word's later tokens."""
        name = inside_of(self.labels[tag]) if self.scheme == "spans" else self.labels[tag]
        return self.labels.index(name) if name in self.labels else tag

    def show(self, sample: Sample, processor: Any) -> str:
        """The words with their tags, but for those outside spans."""
        ids, starts = sample.inputs["input_ids"], [p for p in sample.inputs["words"] if p != NO_TOKEN]
        ends = dict(zip(starts, [*starts[1:], len(ids) - len(WordTokenizer(processor).after)], strict=False))
        parts = []
        for start, tag in zip(sample.inputs["words"], sample.inputs["tags"], strict=True):
            if start != NO_TOKEN:
                text = processor.decode(ids[start : ends[start]], clean_up_tokenization_spaces=False).strip()
                plain = self.scheme == "spans" and self.labels[tag] == OUTSIDE
                parts.append(text if plain else f"{text}[[{self.labels[tag]}]]")
        return " ".join(parts)

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Padded tokens; labels (B, T)."""
        batch = text_batch(samples, processor)
        if all("labels" in s.inputs for s in samples):
            batch["labels"] = padded([s.inputs["labels"] for s in samples], IGNORE)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross entropy over labelled tokens."""
        answer = self.answer(model, batch)
        labels = batch["labels"].flatten()
        logits = own_logits(answer, batch).flatten(0, 1).float()
        weights = logits.new_tensor(self.weights) if self.weights else None
        total = nn.functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=self.options.label_smoothing_factor,
            ignore_index=IGNORE, reduction="sum",
        )  # fmt: skip
        known = labels[labels != IGNORE]
        count = len(known) if weights is None else float(weights[known].sum())
        return LossSum(total, count, outputs=self.keep(answer, batch))

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """The best tag of each token (B, T)."""
        return {"tags": own_logits(answer, batch).detach().argmax(-1).int()}

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Accuracy over words; precision, recall and F1 of spans, or of plain tags; the confusion matrix."""
        from ._classification_metrics import judge_tags

        wanted: dict[str, list[int]] = {}
        given: dict[str, list[int]] = {}
        for sample, found in zip(samples, outputs, strict=True):
            wanted.setdefault(sample.where, []).extend(sample.inputs["tags"])
            given.setdefault(sample.where, []).extend(self._tags(sample, found))
        return judge_tags([*given.values()], [*wanted.values()], self.labels, self.scheme == "spans")

    def _tags(self, sample: Sample, found: Outputs) -> list[int]:
        """The id of each word's tag."""
        by_token = found["tags"].tolist()
        filler = self.labels.index(self.filler)
        return [filler if p == NO_TOKEN else by_token[p] for p in sample.inputs["words"]]

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The tags with spaces between; words, tags and spans in the details."""
        for example, pieces, found in zip(examples, samples, outputs, strict=True):
            words = words_of(example)
            tags = [self.labels[i] for s, o in zip(pieces, found, strict=True) for i in self._tags(s, o)]
            details: dict[str, Any] = {"tokens": words, "tags": tags}
            if self.scheme == "spans":
                details["spans"] = [
                    {"type": s.type, "start": s.start, "end": s.end, "text": " ".join(words[s.start : s.end])}
                    for s in spans_of(tags)
                ]
            reference = None if example.fields.get("tags") is None else " ".join(tags_of(example))
            cut = any("cut" in s.inputs for s in pieces)
            yield Prediction(example.where, " ".join(words), " ".join(tags), reference, cut, details)


def own_logits(answer: Any, batch: Batch) -> Tensor:
    """(B, T, labels) at the batch's own tokens; a prompt method puts virtual ones before them."""
    logits: Tensor = answer.logits[:, -batch["input_ids"].shape[1] :]
    return logits


def words_of(example: Example) -> list[str]:
    """The row's words.

    Raises:
        ValueError: there is none, or one is no text.
    """
    words = list(example.fields["tokens"])
    if not words:
        raise ValueError("the row has no words")
    wrong = next((w for w in words if not isinstance(w, str)), None)
    if wrong is not None:
        raise ValueError(f"words must be text, got {wrong!r}")
    return words


def tags_of(example: Example) -> list[str]:
    """The tag of each word.

    Raises:
        ValueError: there are none, or not one for each word.
    """
    words, tags = words_of(example), example.fields.get("tags")
    if tags is None:
        raise ValueError("the row has no tags")
    if len(tags) != len(words):
        raise ValueError(f"the row has {len(words)} words but {len(tags)} tags")
    return [label_name(t) for t in tags]


TASKS.register(TokenClassification())
