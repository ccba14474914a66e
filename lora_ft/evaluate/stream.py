"""Held-out metrics as running sums, and what a task keeps of each sample; nothing the size of a batch's logits."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ft.records import Batch, LossSum, Sample


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
def evaluate(
    model: Any,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[int]],
    collate: Callable[[Sequence[Sample]], Batch],
    loss: Callable[[Any, Batch], LossSum],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Run the model over micro-batches of samples.

    Args:
        model: put into evaluation mode and left so.
        samples: all of them.
        groups: micro-batches, as indices into `samples`.
        collate: samples -> batch.
        loss: model, batch -> LossSum.
        on_progress: called with (micro-batches done, all).
    """
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    kept: list[Mapping[str, Tensor]] = [{} for _ in samples]
    count = 0.0
    for number, group in enumerate(groups, 1):
        batch = collate([samples[i] for i in group])
        result = loss(model, {k: v.to(device) for k, v in batch.items()})
        sums["loss"] += float(result.total)
        for name, hits in result.hits.items():
            sums[name] += float(hits)
        count += result.count
        outputs = {k: v.cpu() for k, v in result.outputs.items()}
        for row, i in enumerate(group):
            kept[i] = {k: v[row] for k, v in outputs.items()}
        on_progress(number, len(groups))
    return Evaluation({name: value / count for name, value in sums.items()}, kept)
