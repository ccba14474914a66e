"""What tasks share: options and facts, and, for models that read rather than write, prediction over batches.

A task is a frozen dataclass. Its `options` are what the recipe says beside the type; its other fields are what `learn`
found in the data (label names, say), which run.json keeps as `facts`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lora_ft.errors import DataError, Problem, UsageError, did_you_mean
from lora_ft.recipe import Section
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
    moved,
)

IGNORE = -100  # a label that does not count
Outputs = Mapping[str, Tensor]


class Options(Section):
    """A task's own options; a task that has some defines a subclass."""


@dataclass(frozen=True)
class TaskBase:
    """Defaults of the `Task` protocol for a task that reads one forward pass of the model.

    A subclass defines `name`, `description`, `auto_class`, `kinds`, `encoder`, `collate`, `loss`, `keep`, `measure` and
    `decode`.
    """

    options: Options = field(default_factory=Options)

    name: ClassVar[str] = ""
    hub_task: ClassVar[str] = ""
    description: ClassVar[str] = ""
    auto_class: ClassVar[str | None] = None
    peft_task_type: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ()
    new_head: ClassVar[bool] = True
    overlong: ClassVar[str] = "truncate"
    whole_step: ClassVar[bool] = False
    perplexity: ClassVar[bool] = False
    fast_note: ClassVar[str] = ""
    chats: ClassVar[bool] = False
    processor_class: ClassVar[str] = "AutoTokenizer"
    media: ClassVar[bool] = False
    coco: ClassVar[bool] = False

    def configure(self, options: Mapping[str, Any]) -> Self:
        """With the recipe's options, checked."""
        kind = type(self.options)
        try:
            parsed = kind.model_validate(dict(options))
        except ValidationError as error:
            problems = [Problem(_option_problem(self.name, dict(e), list(kind.model_fields))) for e in error.errors()]
            raise UsageError.collect(problems, title=f"{len(problems)} problems with the task's options") from error
        return replace(self, options=parsed)

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> Self:
        """Nothing to learn."""
        return self

    def facts(self) -> dict[str, Any]:
        """All fields but the options."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}

    def recall(self, facts: Mapping[str, Any]) -> Self:
        """The fields as JSON gives them back."""
        own = {f.name for f in fields(self)} - {"options"}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in own}
        return replace(self, **known)

    def model_arguments(self) -> dict[str, Any]:
        """None."""
        return {}

    def check_processor(self, processor: Any) -> list[str]:
        """Nothing to say."""
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """A sample without "labels" where the example has no answer."""
        raise NotImplementedError

    def mix(self, samples: Sequence[Sample], draw: int) -> list[Sample]:
        """As they are."""
        return list(samples)

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Samples -> padded tensors, with "labels" where all samples have them."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The model's own loss, with `keep` of its answer as outputs."""
        raise NotImplementedError

    def fast_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The plain loss: there is no faster form of it."""
        return self.loss(model, batch)

    def represent(self, model: nn.Module, batch: Batch) -> Tensor:
        """Only for tasks whose loss needs the whole step."""
        raise NotImplementedError

    def combine(self, representations: Tensor) -> LossSum:
        """Only for tasks whose loss needs the whole step."""
        raise NotImplementedError

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """The model's answer to everything of the batch but its labels."""
        return model(**in_dtype_of(model, {k: v for k, v in batch.items() if k != "labels"}))

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """What `measure` and `decode` need of an answer: small detached tensors, first dimension the samples."""
        return {"logits": answer.logits.detach().float()}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits."""
        logits: Tensor = self.answer(model, batch).logits
        return logits

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """Each sample as a batch of one without labels."""
        return [{k: v for k, v in self.collate([s], processor).items() if k != "labels"} for s in samples]

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """No metrics but the loss."""
        return Judgement({}, [])

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """One prediction for each example, from the samples it became and the model's outputs for each of these."""
        raise NotImplementedError

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """Encode, run in batches of similar length, decode in the order given."""
        examples = list(examples)
        encode = self.encoder(processor, options.encode)
        samples = [_encoded(e, encode) for e in examples]
        flat = sorted(((i, j) for i, s in enumerate(samples) for j in range(len(s))), key=lambda p: _length(samples, p))
        found: list[list[Outputs]] = [[{}] * len(s) for s in samples]
        device = next(model.parameters()).device
        for start in range(0, len(flat), options.batch_size):
            places = flat[start : start + options.batch_size]
            batch = self.collate([samples[i][j] for i, j in places], processor)
            with torch.inference_mode():
                there = moved(batch, device)
                kept = {k: v.cpu() for k, v in self.keep(self.answer(model, there), there).items()}
            for row, (i, j) in enumerate(places):
                found[i][j] = {k: v[row] for k, v in kept.items()}
        yield from self.decode(examples, samples, found, processor)

    def judge(self, predictions: Sequence[Prediction]) -> Judgement:
        """Answers are judged by `measure`."""
        return Judgement({}, [])

    def prompt(self, processor: Any, example: Example, options: EncodeOptions) -> list[int]:
        """This model does not write."""
        raise UsageError(
            f"the task {self.name} does not write, so there is nothing to chat with", fix="lora-ft predict"
        )

    def reference_lengths(self, processor: Any, examples: Sequence[Example]) -> list[int | None]:
        """Nothing is generated."""
        return [None] * len(examples)

    def generation_defaults(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        """None."""
        return {}


def in_dtype_of(model: nn.Module, batch: Batch) -> Batch:
    """The batch with its floating tensors (pixels, sound) in the dtype of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), None)
    if dtype is None:
        return batch
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def text_batch(samples: Sequence[Sample], processor: Any) -> Batch:
    """input_ids, attention_mask and, where the samples have them, token_type_ids (B, T), padded on the right."""
    pad_id = processor.pad_token_id if processor.pad_token_id is not None else 0
    ids = [s.inputs["input_ids"] for s in samples]
    batch: Batch = {"input_ids": padded(ids, pad_id), "attention_mask": padded([[1] * len(r) for r in ids], 0)}
    if "token_type_ids" in samples[0].inputs:
        batch["token_type_ids"] = padded([s.inputs["token_type_ids"] for s in samples], 0)
    return batch


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(B, T) of the rows, filled up on the right."""
    out = torch.full((len(rows), max(len(r) for r in rows)), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row)
    return out


def _encoded(example: Example, encode: Callable[[Example], Encoded]) -> tuple[Sample, ...]:
    try:
        found = encode(example)
    except ValueError as error:
        raise DataError(str(error), where=example.where) from error
    if not found.samples:
        raise DataError(f"nothing can be predicted for this row: {found.outcome}", where=example.where)
    return found.samples


def _length(samples: Sequence[Sequence[Sample]], place: tuple[int, int]) -> int:
    return samples[place[0]][place[1]].length


def _option_problem(task: str, error: Mapping[str, Any], known: Sequence[str]) -> str:
    name = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"task.{name}: {task} has no such option; {did_you_mean(name, known) if known else 'it has none'}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"task.{name}: {message[0].lower()}{message[1:]}, got {error.get('input')!r}"
