"""What tasks share that give a row one class, or any number of labels, whatever the row is."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.records import Batch, Example, Judgement, LossSum, Prediction, Sample

from ._base import Outputs, TaskBase
from ._labelled import stacked_logits
from ._labels import LabelOptions, class_weights, label_arguments, label_ids, label_name, learn_labels, values_of

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


class ClassOptions(LabelOptions):
    """Options of tasks that give classes."""

    problem_type: Literal["auto", "single_label_classification", "multi_label_classification"] = Field(
        "auto",
        description="One class for each row, or any number of labels; auto: the latter where rows have `labels`.",
    )
    threshold: float = Field(
        0.5, gt=0, lt=1, description="Probability from which a label is given, where a row can have any number of them."
    )


@dataclass(frozen=True)
class ClassTask(TaskBase):
    """A subclass defines what a row is: `kinds`, `encoder` with `answer_of`, `collate` with `labels_of`, and `shown`.

    Attributes:
        labels: in the order of their ids.
        problem_type: Transformers' name of it.
        weights: of each label in the loss; () when all weigh the same.
    """

    options: ClassOptions = field(default_factory=ClassOptions)
    labels: tuple[str, ...] = ()
    problem_type: str = SINGLE
    weights: tuple[float, ...] = ()

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> Self:
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

    @property
    def multi(self) -> bool:
        """Whether a row can have any number of labels."""
        return self.problem_type == MULTI

    def answer_of(self, example: Example) -> tuple[dict[str, Any], str]:
        """{"labels": id, or 0 and 1 for each} and the class for balanced sampling; nothing where there is no label."""
        if not has_label(example):
            return {}, ""
        names = names_of(example, self.multi)
        ids = label_ids(names, self.labels)
        answer = [float(i in ids) for i in range(len(self.labels))] if self.multi else ids[0]
        return {"labels": answer}, "" if self.multi else names[0]

    def shown_answer(self, sample: Sample) -> str:
        """The sample's labels with commas between."""
        answer = sample.inputs["labels"]
        names = [n for n, x in zip(self.labels, answer, strict=True) if x] if self.multi else [self.labels[answer]]
        return ", ".join(names)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross entropy over rows; for labels that do not exclude each other, binary cross entropy over all of them."""
        answer = self.answer(model, batch)
        total, count = self.class_loss(answer.logits.float(), batch["labels"])
        return LossSum(total, count, outputs=self.keep(answer, batch))

    def class_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """Sum and count.

        Args:
            logits: (B, classes).
            labels: (B,) of ids, or (B, classes) of shares or of 0 and 1.
        """
        weights = logits.new_tensor(self.weights) if self.weights else None
        smoothing = self.options.label_smoothing_factor
        if self.multi:
            wanted = labels * (1 - smoothing) + smoothing / 2
            total = nn.functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="sum")
            return total, labels.numel()
        total = nn.functional.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="sum")
        if weights is None:
            return total, len(labels)
        return total, float((labels @ weights if labels.is_floating_point() else weights[labels]).sum())

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Accuracy, precision, recall, F1, ROC-AUC and, for classes, the confusion matrix."""
        from ._classification_metrics import judge_classes, judge_label_sets

        scores = self.probabilities(stacked_logits([s.where for s in samples], outputs)).numpy()
        wanted = torch.tensor([s.inputs["labels"] for s in samples]).long().numpy()
        if self.multi:
            return judge_label_sets(scores, wanted, self.options.threshold)
        return judge_classes(scores, wanted, self.labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class, or of each label on its own."""
        return logits.sigmoid() if self.multi else logits.softmax(-1)

    def shown(self, example: Example) -> str:
        """The row for people."""
        raise NotImplementedError

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The class, or the labels with commas between, and the probability of each."""
        for example, (sample,), found in zip(examples, samples, outputs, strict=True):
            scores = self.probabilities(stacked_logits([example.where], found))[0].tolist()
            names = dict(zip(self.labels, scores, strict=True))
            chosen = [n for n, p in names.items() if p >= self.options.threshold]
            output = ", ".join(chosen) if self.multi else max(names, key=names.__getitem__)
            reference = ", ".join(names_of(example, self.multi)) if has_label(example) else None
            cut = "cut" in sample.inputs
            yield Prediction(example.where, self.shown(example), output, reference, cut, {"scores": names})


def labels_of(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """{"labels": (B,) or (B, labels)} where all samples have them."""
    if not all("labels" in s.inputs for s in samples):
        return {}
    return {"labels": torch.tensor([s.inputs["labels"] for s in samples])}


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
