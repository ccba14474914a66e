"""Held-out metrics as running sums, and what a task keeps of each sample; nothing the size of a batch's logits."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ft.ahead import Ahead
from lora_ft.errors import DataError, DivergedError
from lora_ft.records import Batch, LossSum, Sample, moved


@dataclass(frozen=True)
class Evaluation:
    """What one pass over held-out samples gave.

    Attributes:
        means: mean loss per labelled position, and the task's other sums over the same count.
        outputs: of each sample in order what the task keeps; empty mappings where it keeps nothing.
    """

    means: dict[str, float]
    outputs: list[Mapping[str, Tensor]]


@torch.no_grad()
def evaluate(  # noqa: PLR0913 - what a pass needs
    model: Any,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[int]],
    collate: Callable[[Sequence[Sample]], Batch],
    loss: Callable[[Any, Batch], LossSum],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 0,
) -> Evaluation:
    """Run the model over micro-batches of samples.

    Args:
        model: put into evaluation mode and left so.
        samples: all of them.
        groups: micro-batches, as indices into `samples`.
        collate: samples -> batch.
        loss: model, batch -> LossSum.
        on_progress: called with (micro-batches done, all).
        workers: threads that collate ahead.

    Raises:
        DivergedError: a loss is not finite; names the rows.
        DataError: no sample carries a label.
    """
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    kept: list[Mapping[str, Tensor]] = [{} for _ in samples]
    count = 0.0
    with Ahead(lambda group: collate([samples[i] for i in group]), groups, workers) as batches:
        for number, (group, batch) in enumerate(zip(groups, batches, strict=True), 1):
            result = loss(model, moved(batch, device))
            total = float(result.total)
            if not math.isfinite(total):
                raise _not_finite(total, [samples[i].where for i in group])
            sums["loss"] += total
            for name, hits in result.hits.items():
                sums[name] += float(hits)
            count += result.count
            outputs = {k: v.cpu() for k, v in result.outputs.items()}
            for row, i in enumerate(group):
                kept[i] = {k: v[row] for k, v in outputs.items()}
            on_progress(number, len(groups))
    if not count:
        raise DataError("no held-out row carries a label", where=_some([s.where for s in samples]))
    return Evaluation({name: value / count for name, value in sums.items()}, kept)


def _not_finite(total: float, places: Sequence[str]) -> DivergedError:
    return DivergedError(
        f"the loss of held-out rows is {total}",
        where=_some(places),
        why="the model's answer to one of these rows is not a finite number, so every metric would be wrong",
        fix="look at these rows, at the base in train.dtype float32, and at a lower train.learning_rate",
    )


def _some(places: Sequence[str]) -> str:
    """The rows, once each, the first of many."""
    rows = list(dict.fromkeys(places))
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
