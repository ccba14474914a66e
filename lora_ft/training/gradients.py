"""The gradients of one optimizer step: micro-batches whose loss sums and label counts add up."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.errors import DataError
from lora_ft.records import Batch, LossSum, moved
from lora_ft_adapters import training_mode

from .feed import Step
from .job import Job
from .randomness import random_state, set_random_state

Backward = Callable[[Tensor], None]


def step_gradients(job: Job, parameters: Sequence[nn.Parameter], step: Step, backward: Backward) -> tuple[float, float]:
    """Leave the clipped gradients of the mean loss over all labels of a step in `parameters`.

    Args:
        job: model, losses, settings and the method's hand in the step.
        parameters: what trains.
        step: its samples and micro-batches.
        backward: of a scalar.

    Returns:
        That mean loss, and the gradient norm before clipping.

    Raises:
        DataError: no sample of the step carries a label.
    """
    training_mode(job.model)
    device = next(job.model.parameters()).device
    made = (moved(batch, device) for batch in step.batches)  # one at a time: a batch may be large
    if job.represent is not None and job.combine is not None:
        total, count = _whole_step(job, job.represent, job.combine, step.groups, list(made), backward)
    else:
        total, count = 0.0, 0.0
        for batch in made:
            loss = job.loss(job.model, batch)
            backward(loss.total)
            total, count = total + float(loss.total.detach().double()), count + loss.count
    if not count:
        raise DataError(
            "no sample of a step carries a label, or all their weights are zero",
            where=", ".join(s.where for s in step.samples[:3]),
            fix="look at these rows, or raise train.batch_size",
        )
    penalty = job.driver.penalty()
    if penalty is not None:
        backward(penalty * count)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / count)
    job.driver.before_step()
    limit = job.settings.max_grad_norm
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else math.inf)
    return total / count, float(norm)


def _whole_step(
    job: Job,
    represent: Callable[[Any, Batch], Tensor],
    combine: Callable[[Tensor], LossSum],
    groups: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    backward: Backward,
) -> tuple[float, float]:
    """Gradients of a loss that needs every sample of the step, in the memory of one micro-batch.

    GradCache (Gao et al. 2021, arXiv:2101.06983): represent all without gradients, combine, and represent again micro-
    batch by micro-batch, now backwards from the gradients of the representations. Dropout draws the same masks twice.

    Returns:
        Loss sum and count.
    """
    device = next(job.model.parameters()).device
    taken = torch.tensor([i for g in groups for i in g], device=device)
    in_order = torch.argsort(taken)  # from the order of micro-batches to that of the step
    if len(batches) == 1:
        loss = combine(represent(job.model, batches[0])[in_order])
        backward(loss.total)
        return float(loss.total.detach().double()), loss.count
    states, parts = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(random_state(device))
            parts.append(represent(job.model, batch))
    whole = torch.cat(parts)[in_order].requires_grad_()
    loss = combine(whole)
    backward(loss.total)
    after = random_state(device)
    assert whole.grad is not None
    gradients = torch.split(whole.grad[taken], [len(g) for g in groups])
    for state, batch, gradient in zip(states, batches, gradients, strict=True):
        set_random_state(device, state)
        backward((represent(job.model, batch) * gradient).sum())
    set_random_state(device, after)
    return float(loss.total.detach().double()), loss.count
