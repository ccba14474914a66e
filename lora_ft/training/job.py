"""What a training needs, and how it ended."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ft.recipe import TrainSection
from lora_ft.records import Batch, Listener, LossSum, Sample
from lora_ft_adapters.behaviour import Driver

from .batching import Stratum
from .checkpoint import Progress


@dataclass(frozen=True)
class Job:
    """All that a training needs.

    Attributes:
        model: PeftModel on its device.
        samples: encoded training samples.
        collate: samples, draw -> batch; `batching.draw_of` says what a draw is.
        loss: model, batch -> LossSum; the plain or the verified fast path.
        evaluate: the held-out metrics, `train.metric_for_best_model` among them, or None.
        settings: the recipe's train section.
        steps: optimizer steps in all.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints.
        tokens_per_micro_batch: computed at once, padding included.
        seed: of the order of samples.
        checkpoints: folder.
        identity: what a resumed run must agree with.
        log: takes one record per step or evaluation.
        listener: the display.
        driver: the method's hand in each step.
        lr_scales: of the method: parts of parameter names -> factor on the rate.
        strata: how many samples of which kind an epoch takes; none for each sample once.
        represent: model, batch -> what `combine` needs of each sample (B, ...). With both, `loss` is not used.
        combine: representations of a whole step in its order of samples (N, ...) -> LossSum.
        mix: samples of a step, draw -> the same, with partners for mixing where the task mixes.
        workers: threads that collate ahead.
    """

    model: Any
    samples: Sequence[Sample]
    collate: Callable[[Sequence[Sample], int], Batch]
    loss: Callable[[Any, Batch], LossSum]
    evaluate: Callable[[], dict[str, float]] | None
    settings: TrainSection
    steps: int
    eval_every: int | None
    save_every: int
    tokens_per_micro_batch: int
    seed: int
    checkpoints: Path
    identity: dict[str, Any]
    log: Callable[[Mapping[str, Any]], None]
    listener: Listener
    driver: Driver = field(default_factory=Driver)
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    strata: Sequence[Stratum] = ()
    represent: Callable[[Any, Batch], Tensor] | None = None
    combine: Callable[[Tensor], LossSum] | None = None
    mix: Callable[[list[Sample], int], list[Sample]] = lambda samples, draw: samples
    workers: int = 0

    def __post_init__(self) -> None:
        """A loss of the whole step has two parts."""
        if (self.represent is None) != (self.combine is None):
            raise ValueError("represent and combine go together")


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        progress: final counters.
        stopped_early: whether early stopping ended it.
        best_step: step of the adapter now in the model.
    """

    progress: Progress
    stopped_early: bool
    best_step: int
