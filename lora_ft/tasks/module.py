"""Any torch module on arrays: a user's function builds it, a named loss trains it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lora_ft.errors import Problem, UsageError, did_you_mean
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from ._array_answers import (
    Answer,
    class_answer,
    judge_class_targets,
    judge_number_targets,
    judge_shares,
    number_answer,
    share_answer,
)
from ._arrays import TARGET, Array, by_name, check_shapes, inputs_of, model_arguments, shapes_of, shown, stacked
from ._base import Outputs, TaskBase
from ._labelled import stacked_logits
from ._labels import LabelOptions, class_weights, values_of
from ._module_call import call
from ._named_losses import CLASS, LOSSES, NUMBER, SHARE, check_classes, class_loss, elementwise_loss
from ._targets import classes_in, is_soft, largest_class, target_of


class ModuleOptions(LabelOptions):
    """Options of module."""

    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the function that builds the model."
    )
    loss: str | None = Field(None, description=f"Of torch.nn.functional: {', '.join(LOSSES)}.")
    metrics: Literal["auto", "none"] = Field("auto", description="auto: those that go with the loss.")
    threshold: float = Field(
        0.5, gt=0, lt=1, description="Probability from which the answer is yes, for binary cross entropy."
    )
    input_dtype: Literal["auto", "float", "keep"] = Field(
        "auto",
        description="What inputs of whole numbers become; auto: they stay (int64) where the model has an embedding or "
        "inputs have names, else they become floating.",
    )

    @field_validator("loss")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in LOSSES:
            raise ValueError(f"no such loss; {did_you_mean(value, LOSSES)}")
        return value


@dataclass(frozen=True)
class Module(TaskBase):
    """Arrays and a module that a function builds.

    Attributes:
        labels: names of the classes that the rows have, or of several outputs of yes and no.
        weights: of each class in the loss; () when all weigh the same.
        shapes: of the first row's inputs and target, which all rows have.
        whole: names of the inputs that are whole numbers in every row.
        soft: whether targets are probabilities of classes.
        top: where the largest class is.
        columns: names of the inputs' numbers in their order, where the rows are of a table.
    """

    options: ModuleOptions = field(default_factory=ModuleOptions)
    labels: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    soft: bool = False
    top: str = ""
    columns: tuple[str, ...] = ()

    name = "module"
    description = "Any torch.nn.Module that a Python function builds, on arrays, with a loss of torch.nn.functional."
    kinds = ("arrays",)
    new_head = False
    overlong = "error"

    def configure(self, options: Mapping[str, Any]) -> "Module":
        """With the recipe's options, checked against the loss."""
        task = super().configure(options)
        found = task.options
        if found.loss is None:
            raise UsageError("task.loss: which loss trains the model?", fix=f"one of {', '.join(LOSSES)}")
        kind = LOSSES[found.loss].target
        wrong = {
            "label_smoothing_factor goes with cross_entropy": found.label_smoothing_factor
            and found.loss != "cross_entropy",
            "class_weights go with cross_entropy and nll_loss": found.class_weights and kind != CLASS,
            "labels go with classes": found.labels and kind == NUMBER,
        }
        problems = [Problem(f"task.{what}, not with {found.loss}") for what, is_so in wrong.items() if is_so]
        if problems:
            raise UsageError.collect(problems, title=f"{len(problems)} problems with the task's options")
        return task

    @property
    def kind(self) -> str:
        """What a target is: class, share or number."""
        return LOSSES[self._loss].target

    @property
    def _loss(self) -> str:
        return self.options.loss or "mse_loss"

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> "Module":
        """Shapes, which inputs are whole numbers, the classes and their weights."""
        everything = [*examples, *held_out]
        task = replace(self, soft=self._loss == "cross_entropy" and any(is_soft(e) for e in everything))
        inputs = [i for i, _ in values_of(everything, inputs_of)]
        targets = values_of(everything, task.target_of)
        first = inputs[0] if targets[0][0] is None else {**inputs[0], TARGET: targets[0][0]}
        whole = [n for n in inputs[0] if all(n in i and i[n].dtype.kind != "f" for i in inputs)]
        columns = tuple(examples[0].fields.get("columns", ()))
        task = replace(task, shapes=shapes_of(first), whole=tuple(whole), columns=columns)
        return task._with_labels([(t, where) for t, where in targets if t is not None], len(examples))

    def _with_labels(self, targets: Sequence[tuple[Array, str]], training: int) -> "Module":
        if self.kind == NUMBER or not targets:
            return self
        given = self.options.labels
        if self.kind == SHARE:
            size = targets[0][0].size
            needed = 2 if size == 1 else size
            if given is not None and len(given) != needed:
                what = "no and yes" if size == 1 else f"each of the {size} outputs"
                raise UsageError(f"task.labels: needs {needed} names, of {what}, got {len(given)}")
            return replace(self, labels=given or tuple(str(i) for i in range(needed)))
        largest, where = max(((largest_class(t), where) for t, where in targets), key=lambda p: p[0])
        if given is not None and len(given) <= largest:
            raise UsageError(f"task.labels: {len(given)} names, but a row has the class {largest}", where=where)
        labels = given or tuple(str(i) for i in range(largest + 1))
        counts = Counter(labels[c] for t, _ in targets[:training] for c in classes_in(t))
        return replace(
            self, labels=labels, top=where, weights=class_weights(self.options.class_weights, labels, counts)
        )

    def target_of(self, example: Example) -> Array | None:
        """The row's target as the loss takes it, None where it has none; raises ValueError for one it cannot take."""
        return target_of(example, self.kind, soft=self.soft, labels=self.options.labels)

    def model_arguments(self) -> dict[str, Any]:
        """Those of the function."""
        return dict(self.options.arguments)

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample of length 1 for each row."""

        def encode(example: Example) -> Encoded:
            inputs, target = by_name(example, inputs_of(example), self.columns), self.target_of(example)
            arrays = inputs if target is None else {**inputs, TARGET: target}
            check_shapes(arrays, self.shapes)
            arrays = {n: a if n in self.whole or n == TARGET else a.astype(np.float32) for n, a in arrays.items()}
            labelled = 0 if target is None else len(classes_in(target)) if self.kind == CLASS else target.size
            return Encoded((Sample(arrays, 1, labelled, example.where, self._label(target)),))

        return encode

    def _label(self, target: Array | None) -> str:
        """The class of a row that has one."""
        if target is None or self.kind == NUMBER:
            return ""
        if self.kind == SHARE:
            return self.labels[int(target.item())] if target.size == 1 and target.item() in (0, 1) else ""
        found = classes_in(target)
        return self.labels[found[0]] if len(found) == 1 and found[0] < len(self.labels) else ""

    def show(self, sample: Sample, processor: Any) -> str:
        """The inputs and the target."""
        inputs = {n: a for n, a in sample.inputs.items() if n != TARGET}
        return f"{shown(inputs)} -> [[{shown({'': sample.inputs[TARGET]}).strip('[]')}]]"

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Stacked inputs (B, ...) and labels (B, ...)."""
        return stacked(samples)

    def answer(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's output (B, ...)."""
        return call(model, *model_arguments(batch), self.options.input_dtype)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's output."""
        return self.answer(model, batch)

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """The output of each row, (B, ...) of at least two dimensions."""
        return {"logits": (answer if answer.dim() > 1 else answer[:, None]).detach().float()}

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The named loss as a sum; divided by its count it is what torch gives with reduction="mean"."""
        answer, target = self.answer(model, batch), batch["labels"]
        output = answer if answer.dtype == torch.float64 else answer.float()
        if self.kind != CLASS:
            total, count = elementwise_loss(self._loss, output, target)
        else:
            check_classes(output, target, self.top)
            smoothing = self.options.label_smoothing_factor
            total, count = class_loss(self._loss, output, target, self._weights(output), smoothing)
        return LossSum(total, count, outputs=self.keep(answer, batch))

    def _weights(self, output: Tensor) -> Tensor | None:
        """(C,): classes that no row has weigh 1."""
        if not self.weights:
            return None
        extra = [1.0] * (output.shape[1] - len(self.weights))
        return output.new_tensor([*self.weights, *extra][: output.shape[1]])

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Of classes accuracy, precision, recall, F1, ROC-AUC, confusion; of numbers errors, R2 and Pearson's r."""
        if self.options.metrics == "none":
            return Judgement({}, [])
        scores = self._scores([s.where for s in samples], outputs)
        targets = np.stack([s.inputs[TARGET] for s in samples])
        if self.kind == CLASS:
            return judge_class_targets(scores, targets, self._names(scores.shape[1]))
        rows, wanted = scores.reshape(len(scores), -1), targets.reshape(len(scores), -1).astype(np.float64)
        if self.kind == SHARE:
            return judge_shares(rows, wanted, self.labels, self.options.threshold)
        return judge_number_targets(rows, wanted)

    def _scores(self, places: Sequence[str], outputs: Sequence[Outputs]) -> Any:
        """(rows, ...) in float64: probabilities of classes, or values."""
        flat = stacked_logits(places, [{"logits": o["logits"].flatten()} for o in outputs])
        return LOSSES[self._loss].scores(flat.reshape(len(flat), *outputs[0]["logits"].shape)).numpy()

    def _names(self, count: int) -> list[str]:
        return [*self.labels[:count], *(str(i) for i in range(len(self.labels), count))]

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The class with the scores of all, the labels, or the number."""
        for example, (sample,), found in zip(examples, samples, outputs, strict=True):
            scores = self._scores([example.where], found)[0]
            answer = self._answer_of(scores)
            inputs = {n: a for n, a in sample.inputs.items() if n != TARGET}
            reference = self._reference(sample.inputs.get(TARGET), scores)
            yield Prediction(example.where, shown(inputs), answer.text, reference, details=answer.details)

    def _answer_of(self, scores: Any) -> Answer:
        if self.kind == CLASS:
            return class_answer(scores, self._names(len(scores)))
        if self.kind == SHARE:
            return share_answer(scores.ravel(), self.labels, self.options.threshold)
        return number_answer(scores)

    def _reference(self, target: Array | None, scores: Any) -> str | None:
        """The target in the form of an answer."""
        if target is None:
            return None
        if self.kind != CLASS:
            return self._answer_of(target.astype(np.float64)).text
        names = self._names(max(len(scores), largest_class(target) + 1))
        return " ".join(names[c] for c in classes_in(target))


TASKS.register(Module())
