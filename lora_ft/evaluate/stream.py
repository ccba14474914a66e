"""Held-out metrics as running sums; nothing the size of a batch is kept."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_ft.records import Batch, LossSum, Sample


@torch.no_grad()
def evaluate(
    model: Any,
    groups: Sequence[Sequence[Sample]],
    collate: Callable[[Sequence[Sample]], Batch],
    loss: Callable[[Any, Batch], LossSum],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Mean loss per labelled position, and the task's other metrics, over micro-batches of samples.

    Args:
        model: put into evaluation mode and left so.
        groups: samples, already cut into micro-batches.
        collate: samples -> batch.
        loss: model, batch -> LossSum.
        on_progress: called with (micro-batches done, all).
    """
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    count = 0
    for number, group in enumerate(groups, 1):
        result = loss(model, {k: v.to(device) for k, v in collate(group).items()})
        sums["loss"] += float(result.total)
        for name, hits in result.hits.items():
            sums[name] += float(hits)
        count += result.count
        on_progress(number, len(groups))
    return {name: value / count for name, value in sums.items()}
