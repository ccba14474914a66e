"""What flows between the stages: frozen records, and nothing that needs torch at import time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, Any]  # name -> tensor, ready for the model; "labels" where the samples have them
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse", "rmse", "mae", "wer", "cer"})


def moved(value: Any, device: Any) -> Any:
    """A batch, or a part of one (a list, a mapping), with all its tensors on a device."""
    if isinstance(value, Mapping):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [moved(v, device) for v in value]
    return value.to(device) if hasattr(value, "to") else value


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of this metric is the better one."""
    return metric in LOWER_IS_BETTER


@dataclass(frozen=True, slots=True)
class Example:
    """One row in the canonical form that all formats share, before a task encodes it.

    Attributes:
        fields: what the format's kind holds; `lora_ft/data/_format.py` lists the kinds.
        where: file and line or row, for messages to the user; no two rows share it.
        source: the file or set it came from, for mixing.
        group: rows of one group are never parted by a split; "" for none.
        root: folder that paths of images and sounds in the fields start from and may not leave.
    """

    fields: Mapping[str, Any]
    where: str
    source: str = ""
    group: str = ""
    root: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded training sample.

    Attributes:
        inputs: name -> numbers of this sample (list, nested list or array), not padded; or a `Media`, which `collate`
            reads when its turn comes.
        length: its cost in tokens.
        labelled: number of positions that carry a label.
        where: the row it came from; samples of one row share it.
        label: its class, for balanced sampling; "" where there is none.
        source: the set it came from, for mixing.
        place: its number in its set, which what is drawn for it depends on.
    """

    inputs: Mapping[str, Any]
    length: int
    labelled: int
    where: str
    label: str = ""
    source: str = ""
    place: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a task made of one example: its samples, and what happened to it ("" when nothing did)."""

    samples: tuple[Sample, ...]
    outcome: str = ""


@dataclass(frozen=True)
class EncodeOptions:
    """How rows become tokens.

    Attributes:
        max_length: tokens per sample.
        overlong: what happens to a longer row: drop, truncate_prompt, truncate or error.
        system_prompt: put before conversations that have none.
        template: auto (the tokenizer's chat template when it has one) or none (raw text).
        max_pixels: of an image or mask; a larger one is an error.
        max_seconds: of a sound; a longer one is over-long.
        resample: whether sound of another rate than the model's is resampled; else it is an error.
    """

    max_length: int = 2048
    overlong: str = "drop"
    system_prompt: str | None = None
    template: str = "auto"
    max_pixels: int = 50_000_000
    max_seconds: float = 30.0
    resample: bool = True


@dataclass(frozen=True, slots=True)
class LossSum:
    """Loss as a sum over `count` labelled positions, so that micro-batches and ranks simply add.

    Attributes:
        total: differentiable sum.
        count: labelled positions, or the sum of their weights.
        hits: further sums over the same positions, by metric name; they are meaningful without gradients only.
        outputs: what metrics over the whole set need, by name; small, detached, first dimension the samples.
    """

    total: Tensor
    count: float
    hits: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Output of a model for one example, beside what was wanted.

    Attributes:
        where: the row.
        input: the prompt.
        output: what the model wrote.
        reference: what was wanted, or None.
        cut: whether the input was too long and lost a part.
        details: further values for the row's file, such as a score for each label.
    """

    where: str
    input: str
    output: str
    reference: str | None
    cut: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PredictOptions:
    """How answers are written.

    Attributes:
        max_new_tokens: most tokens in an answer.
        batch_size: answers written at once.
        encode: as in training, so that the model sees the same kind of prompt.
    """

    max_new_tokens: int
    batch_size: int
    encode: EncodeOptions


@dataclass(frozen=True)
class Judgement:
    """Metrics over a set of rows.

    Attributes:
        metrics: by name; those of `lower_is_better` fall as the model gets better.
        right: for each row in order whether it is right; empty where a row is not right or wrong.
        tables: what is more than a number, such as a confusion matrix.
    """

    metrics: dict[str, float]
    right: list[bool]
    tables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataReport:
    """What was read and what became of it; printed before training."""

    source: str
    format: str
    rows: int
    samples: int
    tokens: int
    labelled_tokens: int
    outcomes: Mapping[str, int] = field(default_factory=dict)
    sample_shown: str = ""


@dataclass(frozen=True)
class Plan:
    """What training will do, known before the first step."""

    steps: int
    epochs: float
    batch_size: int
    rows: int
    tokens_per_epoch: int
    trainable_parameters: int
    total_parameters: int
    fast_path: str


class Listener(Protocol):
    """Hears of a run while it goes on; the terminal display is one."""

    def note(self, text: str) -> None:
        """Something a user should know."""

    def warn(self, text: str) -> None:
        """Something a user should act on."""

    def start(self, plan: Plan) -> None:
        """Training begins."""

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step is done: step, loss, lr, tokens_per_s, memory_bytes, ..."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The held-out rows were judged after this step; what it raises ends the training."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A long stage other than training, such as an evaluation, moves on."""

    def finish(self) -> None:
        """Training is over, however it ended."""


class Silent:
    """A listener that says nothing."""

    def note(self, text: str) -> None:
        """Ignore."""

    def warn(self, text: str) -> None:
        """Ignore."""

    def start(self, plan: Plan) -> None:
        """Ignore."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Ignore."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ignore."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
