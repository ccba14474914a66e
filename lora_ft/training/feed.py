"""Micro-batches of a training's steps, in order, read and collated by threads ahead of the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft.ahead import Ahead
from lora_ft.records import Batch, Sample

from .batching import OVERHEAD, Order, draw_of, micro_batches
from .job import Job


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step.

    Attributes:
        samples: all of them, mixed where the task mixes.
        groups: micro-batches, as indices into `samples`.
        batches: one for each group, on the CPU, as they are asked for.
    """

    samples: Sequence[Sample]
    groups: Sequence[Sequence[int]]
    batches: Iterator[Batch]


class Feed:
    """The steps from `start` to the job's end; which samples and what randomness hang on seed and step only.

    Args:
        job: samples, their order's seed, and how they are collated.
        order: samples of each step.
        start: first step, from 0.

    """

    def __init__(self, job: Job, order: Order, start: int) -> None:
        self.job, self.order, self.at = job, order, start
        self._steps: dict[int, tuple[list[Sample], list[list[int]], int]] = {}
        self._ahead = Ahead(self._made, self._parts(start), job.workers)

    @property
    def waited(self) -> float:
        """Seconds that the model waited for batches."""
        return self._ahead.waited

    def next(self) -> Step:
        """The next step."""
        samples, groups, _ = self._planned(self.at)
        step, self.at = self.at, self.at + 1

        def batches() -> Iterator[Batch]:
            for _ in groups:
                yield next(self._ahead)
            self._steps.pop(step, None)

        return Step(samples, groups, batches())

    def close(self) -> None:
        """Give the threads back."""
        self._ahead.close()

    def _parts(self, start: int) -> Iterator[tuple[list[Sample], int]]:
        for step in range(start, self.job.steps):
            samples, groups, draw = self._planned(step)
            for group in groups:
                yield [samples[i] for i in group], draw

    def _made(self, part: tuple[list[Sample], int]) -> Batch:
        return self.job.collate(*part)

    def _planned(self, step: int) -> Any:
        if step not in self._steps:
            chosen, epoch = self.order.step(step)
            draw = draw_of(self.job.seed, epoch)
            samples = self.job.mix([self.job.samples[i] for i in chosen], draw)
            budget = self.job.tokens_per_micro_batch
            # A loss of the whole step runs every micro-batch twice as soon as there are two.
            overhead = OVERHEAD if self.job.combine is None else budget
            groups = micro_batches([s.length for s in samples], budget, overhead)
            self._steps[step] = (samples, groups, draw)
        return self._steps[step]
