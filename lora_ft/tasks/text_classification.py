"""One class for a text or a pair of texts, or any number of labels."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from ._base import Outputs, TaskBase
from ._labelled import encode_text, labelled_batch, shown_text, stacked_logits
from ._labels import LabelOptions, class_weights, label_arguments, label_ids, label_name, learn_labels, values_of

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


class ClassificationOptions(LabelOptions):
    """Options of text-classification."""

    problem_type: Literal["auto", "single_label_classification", "multi_label_classification"] = Field(
        "auto",
        description="One class for each row, or any number of labels; auto: the latter where rows have `labels`.",
    )
    threshold: float = Field(
        0.5, gt=0, lt=1, description="Probability from which a label is given, where a row can have any number of them."
    )


@dataclass(frozen=True)
class TextClassification(TaskBase):
    """Texts and pairs of texts with classes.

    Attributes:
        labels: in the order of their ids.
        problem_type: Transformers' name of it.
        weights: of each label in the loss; () when all weigh the same.
    """

    options: ClassificationOptions = field(default_factory=ClassificationOptions)
    labels: tuple[str, ...] = ()
    problem_type: str = SINGLE
    weights: tuple[float, ...] = ()

    name = "text-classification"
    description = "A text, or a pair of texts, gets one class, or any number of labels."
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    kinds = ("labelled",)

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> "TextClassification":
        """The labels, whether a row can have several, and what each weighs."""
        problem: str = self.options.problem_type
        if problem == "auto":
            problem = MULTI if any("labels" in e.fields for e in examples) else SINGLE
        read = partial(names_of, multi=problem == MULTI)
        train, held = values_of(examples, read), values_of(held_out, read)
        labels = learn_labels(train, held, self.options.labels, least=1 if problem == MULTI else 2)
        counts = Counter(name for names, _ in train for name in names)
        rows = len(train) if problem == MULTI else None
        weights = class_weights(self.options.class_weights, labels, counts, rows)
        return replace(self, labels=labels, problem_type=problem, weights=weights)

    def model_arguments(self) -> dict[str, Any]:
        """The labels both ways, and the kind of problem."""
        return {**label_arguments(self.labels), "problem_type": self.problem_type}

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each row."""

        def encode(example: Example) -> Encoded:
            if not has_label(example):
                return encode_text(example, processor, options, {})
            names = names_of(example, self.multi)
            ids = label_ids(names, self.labels)
            answer = [float(i in ids) for i in range(len(self.labels))] if self.multi else ids[0]
            return encode_text(example, processor, options, {"labels": answer}, "" if self.multi else names[0])

        return encode

    @property
    def multi(self) -> bool:
        """Whether a row can have any number of labels."""
        return self.problem_type == MULTI

    def show(self, sample: Sample, processor: Any) -> str:
        """The text and its label."""
        text = processor.decode(list(sample.inputs["input_ids"]), clean_up_tokenization_spaces=False)
        answer = sample.inputs["labels"]
        names = [n for n, x in zip(self.labels, answer, strict=True) if x] if self.multi else [self.labels[answer]]
        return f"{text} [[{', '.join(names)}]]"

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Padded texts; labels (B,) of ids, or (B, labels) of 0 and 1."""
        return labelled_batch(samples, processor)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross entropy over rows; for labels that do not exclude each other, binary cross entropy over all of them."""
        answer = self.answer(model, batch)
        total, count = self._loss(answer.logits.float(), batch["labels"])
        return LossSum(total, count, outputs=self.keep(answer, batch))

    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        weights = logits.new_tensor(self.weights) if self.weights else None
        smoothing = self.options.label_smoothing_factor
        if not self.multi:
            total = nn.functional.cross_entropy(
                logits, labels, weight=weights, label_smoothing=smoothing, reduction="sum"
            )
            return total, len(labels) if weights is None else float(weights[labels].sum())
        wanted = labels * (1 - smoothing) + smoothing / 2
        total = nn.functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="sum")
        return total, labels.numel()

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Accuracy, precision, recall, F1, ROC-AUC and, for classes, the confusion matrix."""
        from ._classification_metrics import judge_classes, judge_label_sets

        scores = self._probabilities(stacked_logits([s.where for s in samples], outputs)).numpy()
        wanted = torch.tensor([s.inputs["labels"] for s in samples]).long().numpy()
        if self.multi:
            return judge_label_sets(scores, wanted, self.options.threshold)
        return judge_classes(scores, wanted, self.labels)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.multi else logits.softmax(-1)

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The class, or the labels with commas between, and the probability of each."""
        for example, (sample,), found in zip(examples, samples, outputs, strict=True):
            scores = self._probabilities(stacked_logits([example.where], found))[0].tolist()
            names = dict(zip(self.labels, scores, strict=True))
            chosen = [n for n, p in names.items() if p >= self.options.threshold]
            output = ", ".join(chosen) if self.multi else max(names, key=names.__getitem__)
            reference = ", ".join(names_of(example, self.multi)) if has_label(example) else None
            cut = "cut" in sample.inputs
            yield Prediction(example.where, shown_text(example), output, reference, cut, {"scores": names})


def has_label(example: Example) -> bool:
    """Whether the row has an answer."""
    fields: Mapping[str, Any] = example.fields
    return fields.get("label") is not None or fields.get("labels") is not None


def names_of(example: Example, multi: bool) -> list[str]:
    """The row's labels: one, or with `multi` any number of them.

    Raises:
        ValueError: no label, several where there must be one, or one that is no name.
    """
    several, one = example.fields.get("labels"), example.fields.get("label")
    if several is None:
        return [label_name(one)]
    if not multi:
        raise ValueError("the row has a list of labels, but task.problem_type is single_label_classification")
    return list(dict.fromkeys(label_name(x) for x in several))


TASKS.register(TextClassification())
