"""A number for a text or a pair of texts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from lora_ft.errors import DataError
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from ._base import Options, Outputs, TaskBase
from ._labelled import encode_text, labelled_batch, shown_text, stacked_logits
from ._labels import values_of

LARGEST = torch.finfo(torch.float32).max


class RegressionOptions(Options):
    """Options of regression."""

    standardize: bool = Field(
        True,
        description="Learn (label - mean) / std of the training rows; metrics and predictions have the labels' unit.",
    )


@dataclass(frozen=True)
class Regression(TaskBase):
    """Texts and pairs of texts with a number.

    Attributes:
        mean: of the training labels; 0 when they are learnt as they are.
        std: of the training labels; 1 when they are learnt as they are.
    """

    options: RegressionOptions = field(default_factory=RegressionOptions)
    mean: float = 0.0
    std: float = 1.0

    name = "regression"
    hub_task = "text-classification"
    description = "A text, or a pair of texts, gets a number."
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    kinds = ("labelled",)

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> "Regression":
        """Mean and standard deviation of the training labels."""
        numbers = np.array([n for n, _ in values_of(examples, number_of)])
        values_of(held_out, number_of)
        if numbers.min() == numbers.max() or not numbers.std():
            raise DataError(
                f"all {len(numbers)} training rows have the label {numbers[0]:g}",
                why="there is nothing to learn",
                fix="check the labels",
            )
        if not self.options.standardize:
            return self
        return replace(self, mean=float(numbers.mean()), std=float(numbers.std()))

    def model_arguments(self) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each row; its label is what the model learns."""

        def encode(example: Example) -> Encoded:
            if example.fields.get("label") is None:
                return encode_text(example, processor, options, {})
            return encode_text(example, processor, options, {"labels": (number_of(example) - self.mean) / self.std})

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The text and its number."""
        text = processor.decode(list(sample.inputs["input_ids"]), clean_up_tokenization_spaces=False)
        return f"{text} [[{sample.inputs['labels'] * self.std + self.mean:.6g}]]"

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Padded texts; labels (B,)."""
        return labelled_batch(samples, processor)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Squared error of what is learnt."""
        answer = self.answer(model, batch)
        total = nn.functional.mse_loss(answer.logits[:, 0].float(), batch["labels"], reduction="sum")
        return LossSum(total, len(batch["labels"]), outputs=self.keep(answer, batch))

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Squared and absolute error, R2 and Pearson's r, of numbers in the labels' unit."""
        wanted = np.array([s.inputs["labels"] for s in samples], dtype=np.float64) * self.std + self.mean
        return Judgement(judge_numbers(self._numbers([s.where for s in samples], outputs), wanted), [])

    def _numbers(self, places: Sequence[str], outputs: Sequence[Outputs]) -> NDArray[np.float64]:
        """(rows,) in the labels' unit."""
        numbers: NDArray[np.float64] = stacked_logits(places, outputs)[:, 0].numpy() * self.std + self.mean
        return numbers

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The number, to six digits as text and whole in the details."""
        for example, (sample,), found in zip(examples, samples, outputs, strict=True):
            value = float(self._numbers([example.where], found)[0])
            label = example.fields.get("label")
            yield Prediction(
                example.where, shown_text(example), f"{value:.6g}", None if label is None else str(label),
                "cut" in sample.inputs, {"value": value},
            )  # fmt: skip


def number_of(example: Example) -> float:
    """The row's label as a number.

    Raises:
        ValueError: it is none, or not finite.
    """
    label = example.fields.get("label")
    if label is None and "labels" in example.fields:
        raise ValueError("the row has a list of labels; regression learns one number")
    try:
        number = math.nan if isinstance(label, bool) or "_" in str(label) else float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise ValueError(f"the label {label!r} is no finite number")
    return number


def judge_numbers(given: NDArray[np.float64], wanted: NDArray[np.float64]) -> dict[str, float]:
    """mse, mae and, where the wanted numbers differ, r2 and pearson (0 for an answer that is always the same)."""
    from sklearn import metrics
    from sklearn.feature_selection import r_regression

    found = {
        "mse": float(metrics.mean_squared_error(wanted, given)),
        "mae": float(metrics.mean_absolute_error(wanted, given)),
    }
    if wanted.min() < wanted.max():
        found["r2"] = float(metrics.r2_score(wanted, given))
        found["pearson"] = float(r_regression(given[:, None], wanted)[0])
    return found


TASKS.register(Regression())
