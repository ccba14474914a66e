"""Fit a new head on cached features: the frozen part runs once over all rows, the head is fitted to the end.

With a linear head and cross entropy this is logistic regression, a convex problem; L-BFGS solves it in float64. The
strength of the L2 penalty on the head's matrices is chosen by cross-validation on the training rows.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.errors import UsageError
from lora_ft.records import Batch, LossSum, Sample
from lora_ft_adapters import trainable

from .batching import by_length

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of 0.5 * penalty * |W|^2 beside the mean loss
FOLDS = 5
ITERATIONS = 300
TRIAL_ITERATIONS = 40  # enough to tell penalties apart
TOLERANCE = 1e-3  # relative difference of the loss on cached features and through the whole model
Loss = Callable[[Any, Batch], LossSum]


@dataclass(frozen=True)
class Fit:
    """How a head was fitted.

    Attributes:
        loss: mean training loss of the fitted head, without the penalty.
        penalty: the chosen one.
        rows: samples.
        cache_s: seconds for the features.
        fit_s: seconds for the head, cross-validation included.
    """

    loss: float
    penalty: float
    rows: int
    cache_s: float
    fit_s: float


def fit_head(
    model: nn.Module, samples: Sequence[Sample], collate: Callable[[Sequence[Sample]], Batch], loss: Loss, *,
    budget: int, seed: int,
) -> Fit:  # fmt: skip
    """Fit the one module of `model` that trains, in place.

    Args:
        model: adapted so that only a head trains.
        samples: training samples.
        collate: samples -> batch with "labels".
        loss: model, batch -> LossSum, from the model's `logits`.
        budget: tokens computed at once, padding included.
        seed: of the folds.

    Raises:
        UsageError: more than a head trains, or its features do not give the model's own loss.
    """
    started = time.perf_counter()
    head = _head(model, collate(samples[:1]))
    features = _features(model, head, samples, collate, budget)
    _check(model, head, samples, features, collate, loss)
    cached = time.perf_counter()
    problem = _Problem(copy.deepcopy(head).double(), features, samples, collate, loss)
    penalty = _best_penalty(problem, seed)
    fitted, value = problem.solve(list(range(len(samples))), penalty)
    with torch.no_grad():
        for target, source in zip(head.parameters(), fitted.parameters(), strict=True):
            if target.requires_grad:
                target.copy_(source)
    return Fit(value, penalty, len(samples), cached - started, time.perf_counter() - cached)


def _head(model: nn.Module, batch: Batch) -> nn.Module:
    """The innermost module that holds all that trains and that a forward pass calls once with a tensor of floats."""
    names = [n for n, _ in trainable(model)]
    common = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")
        common = common[: next((i for i, c in enumerate(common) if i >= len(parts) or parts[i] != c), len(common))]
    for depth in range(len(common), 0, -1):
        path = ".".join(common[:depth])
        module = model.get_submodule(path)
        seen = _inputs(model, module, batch)
        if len(seen) == 1 and seen[0].is_floating_point():
            return module
    raise UsageError(
        f"train.few_shot fits a new head on frozen features, and {len(names)} tensors train in several places "
        f"({names[0]}, {names[-1]})",
        where="method",
        fix="method: head",
    )


@torch.no_grad()
def _inputs(model: nn.Module, module: nn.Module, batch: Batch) -> list[Tensor]:
    """What a forward pass over `batch` gives `module`."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append(args[0].detach())

    handle = module.register_forward_pre_hook(keep)
    try:
        device = next(model.parameters()).device
        model.eval()(**{k: v.to(device) for k, v in batch.items() if k != "labels"})
    finally:
        handle.remove()
    return seen


def _features(
    model: nn.Module, head: nn.Module, samples: Sequence[Sample], collate: Callable[[Sequence[Sample]], Batch],
    budget: int,
) -> list[Tensor]:  # fmt: skip
    """The head's input for each sample, (D,) or (T, D) without padding, on the CPU in float64."""
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    for group in by_length([s.length for s in samples], budget):
        (given,) = _inputs(model, head, collate([samples[i] for i in group]))
        for row, i in enumerate(group):
            one = given[row].double().cpu()
            found[i] = one[: samples[i].length] if one.dim() > 1 else one
    return found


def _check(
    model: nn.Module, head: nn.Module, samples: Sequence[Sample], features: Sequence[Tensor],
    collate: Callable[[Sequence[Sample]], Batch], loss: Loss,
) -> None:  # fmt: skip
    """The loss on cached features must be the model's own."""
    few = samples[:4]
    batch = collate(few)
    device = next(model.parameters()).device
    with torch.no_grad():
        whole = loss(model.eval(), {k: v.to(device) for k, v in batch.items()}).total.double().cpu()
        cached = copy.deepcopy(head).cpu().double().eval()
        short = loss(_OnFeatures(cached), _cached_batch(batch, features[: len(few)])).total.double()
    if not torch.allclose(whole, short, rtol=TOLERANCE if next(head.parameters()).dtype == torch.float32 else 2e-2):
        raise UsageError(
            f"train.few_shot: the loss on cached features is {float(short):.5g}, the model's own {float(whole):.5g}",
            why="this model does more after its head than the features show",
            fix="--set train.few_shot=false",
        )


class _OnFeatures(nn.Module):
    """The head where the whole model would stand."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, **_others: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(features))


def _cached_batch(batch: Batch, features: Sequence[Tensor]) -> Batch:
    rows = (
        nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        if features[0].dim() > 1
        else torch.stack([*features])
    )
    labels = batch["labels"]
    return {"features": rows, "labels": labels.double() if labels.is_floating_point() else labels}


class _Problem:
    """A head, the features of all samples, and the loss to minimise."""

    def __init__(
        self, head: nn.Module, features: Sequence[Tensor], samples: Sequence[Sample],
        collate: Callable[[Sequence[Sample]], Batch], loss: Loss,
    ) -> None:  # fmt: skip
        self.head, self.features, self.samples, self.collate, self.loss = head.cpu(), features, samples, collate, loss

    def batch(self, rows: Sequence[int]) -> Batch:
        """All these rows at once."""
        return _cached_batch(self.collate([self.samples[i] for i in rows]), [self.features[i] for i in rows])

    def solve(self, rows: Sequence[int], penalty: float, iterations: int = ITERATIONS) -> tuple[nn.Module, float]:
        """The best head for these rows, and its mean loss on them."""
        head = copy.deepcopy(self.head).eval()
        model, batch = _OnFeatures(head), self.batch(rows)
        params = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(
            params, max_iter=iterations, tolerance_grad=1e-7, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            result = self.loss(model, batch)
            value = result.total / result.count
            for p in params:
                value = value + (0.5 * penalty * p.square().sum() if p.dim() > 1 else 0.0)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return head, self.mean(head, rows)

    @torch.no_grad()
    def mean(self, head: nn.Module, rows: Sequence[int]) -> float:
        """Mean loss of a head on some rows."""
        result = self.loss(_OnFeatures(head), self.batch(rows))
        return float(result.total) / result.count


def _best_penalty(problem: _Problem, seed: int) -> float:
    """The penalty with the lowest cross-validated loss; the middle one where there are too few rows to tell."""
    rows = len(problem.samples)
    if rows < 2 * FOLDS:
        return PENALTIES[len(PENALTIES) // 2]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    folds = [order[i::FOLDS] for i in range(FOLDS)]

    def score(penalty: float) -> float:
        total = 0.0
        for held in folds:
            head, _ = problem.solve(sorted(set(order) - set(held)), penalty, TRIAL_ITERATIONS)
            total += problem.mean(head, held) * len(held)
        return total

    return min(PENALTIES, key=score)
