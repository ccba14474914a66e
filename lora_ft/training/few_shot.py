"""Fit a new head on cached features: the frozen part runs once over all rows, the head is fitted to the end.

With a linear head and cross entropy this is logistic regression, a convex problem; L-BFGS solves it on float64
features. The strength of the L2 penalty on the head's matrices is chosen by cross-validation on the training rows.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.errors import UsageError
from lora_ft.records import Batch, LossSum, Sample, moved
from lora_ft_adapters import trainable

from .batching import by_length
from .few_shot_check import WITHOUT
from .few_shot_check import check as check

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of 0.5 * penalty * |W|^2 beside the mean loss; strongest first
FOLDS = 5
ITERATIONS = 300
TRIAL_ITERATIONS = 60  # enough to tell penalties apart; a linear head starts where the stronger penalty ended
HISTORY = 20  # gradients that L-BFGS remembers; each is the size of the head
TOLERANCE = 1e-3  # relative difference of the loss on cached features and through the whole model
CHECKED = 4  # samples for that
Loss = Callable[[Any, Batch], LossSum]
Collate = Callable[[Sequence[Sample]], Batch]


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
    model: nn.Module, samples: Sequence[Sample], collate: Collate, loss: Loss, *, budget: int, seed: int
) -> Fit:
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
    _check(model, head, samples[:CHECKED], features[:CHECKED], collate, loss)
    cached = time.perf_counter()
    problem = _Problem(copy.deepcopy(head).cpu().double().eval(), features, samples, collate, loss)
    penalty = _best_penalty(problem, seed)
    batch = problem.batch(range(len(samples)))
    fitted = problem.fit(batch, penalty, ITERATIONS)
    with torch.no_grad():
        for target, source in zip(head.parameters(), fitted.parameters(), strict=True):
            if target.requires_grad:
                target.copy_(source)
    total, count = problem.judged(fitted, batch)
    return Fit(total / count, penalty, len(samples), cached - started, time.perf_counter() - cached)


@dataclass(frozen=True)
class _Seen:
    """What one forward pass gave a module, what that made of it, and what the model answered."""

    given: Tensor
    made: Tensor
    logits: Tensor


def _head(model: nn.Module, batch: Batch) -> nn.Module:
    """The innermost module that holds all that trains and that a forward pass calls once with a tensor of floats."""
    names = [n for n, _ in trainable(model)]
    common = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")
        common = common[: next((i for i, c in enumerate(common) if i >= len(parts) or parts[i] != c), len(common))]
    for depth in range(len(common), 0, -1):
        module = model.get_submodule(".".join(common[:depth]))
        if _run(model, module, batch) is not None:
            return module
    raise UsageError(
        f"train.few_shot fits one head on frozen features, and {len(names)} tensors train in several places "
        f"({names[0]}, {names[-1]})",
        where="model",
        why="a part of the body is not in this base's files, so it is new and must train too",
        fix=f"a base whose files have it, or {WITHOUT}",
    )


@torch.no_grad()
def _run(model: nn.Module, module: nn.Module, batch: Batch) -> _Seen | None:
    """One forward pass; None where it does not call the module once, with floats."""
    seen: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(lambda _, args, made: seen.append((args[0] if args else None, made)))
    try:
        device = next(model.parameters()).device
        answer = model.eval()(**moved({k: v for k, v in batch.items() if k != "labels"}, device))
    finally:
        handle.remove()
    if len(seen) != 1 or not all(isinstance(t, Tensor) and t.is_floating_point() for t in seen[0]):
        return None
    return _Seen(*seen[0], answer.logits)


@torch.no_grad()
def _features(
    model: nn.Module, head: nn.Module, samples: Sequence[Sample], collate: Collate, budget: int
) -> list[Tensor]:
    """The head's input for each sample, (D,) or (T, D) without padding, on the CPU in float64."""
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    for group in by_length([s.length for s in samples], budget):
        seen = _run(model, head, collate([samples[i] for i in group]))
        if seen is None or len(seen.given) != len(group) or len(seen.logits) != len(group):
            raise _unfit("it does not call its head once for each row")
        given = _read_positions(head, seen)
        for row, i in enumerate(group):
            one = given[row].double().cpu()
            found[i] = one[: samples[i].length] if one.dim() > 1 else one
    return found


def _read_positions(head: nn.Module, seen: _Seen) -> Tensor:
    """The head's input without positions that the answer does not depend on: (B, D), (B, 1, D) or (B, T, D)."""
    given, made, logits = seen.given, seen.made, seen.logits
    if given.dim() == 3 and made.dim() == 3 and logits.dim() == 2:  # a decoder: the answer at the last real token
        place = (made - logits[:, None].to(made.dtype)).abs().amax(-1).argmin(1)
        return given[torch.arange(len(given), device=given.device), place]
    if given.dim() == 3 and made.dim() == 2 and torch.equal(head(given[:, :1]), made):
        return given[:, :1]  # a head that takes the first token out of all
    return given


def _check(
    model: nn.Module, head: nn.Module, samples: Sequence[Sample], features: Sequence[Tensor], collate: Collate,
    loss: Loss,
) -> None:  # fmt: skip
    """The loss on cached features must be the model's own."""
    batch = collate(samples)
    device = next(model.parameters()).device
    with torch.no_grad():
        whole = loss(model.eval(), moved(batch, device)).total.double().cpu()
        cached = copy.deepcopy(head).cpu().double().eval()
        try:
            short = loss(_OnFeatures(cached), _cached_batch(batch, features)).total.double()
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise _unfit(f"its loss cannot be computed from the head alone ({error})") from error
    if not torch.allclose(whole, short, rtol=TOLERANCE if next(head.parameters()).dtype == torch.float32 else 2e-2):
        raise _unfit(f"the loss on cached features is {float(short):.5g}, the model's own {float(whole):.5g}")


def _unfit(why: str) -> UsageError:
    return UsageError("train.few_shot does not work on this model", where="model", why=why, fix=WITHOUT)


class _OnFeatures(nn.Module):
    """The head where the whole model would stand."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, **_others: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(features))


def _cached_batch(batch: Mapping[str, Any], features: Sequence[Tensor]) -> Batch:
    rows = (
        nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        if features[0].dim() > 1
        else torch.stack([*features])
    )
    labels = batch["labels"]
    # The rest stays: some losses look at the shape of the input.
    return {**batch, "features": rows, "labels": labels.double() if labels.is_floating_point() else labels}


class _Problem:
    """A head, the features of all samples, and the loss to minimise."""

    def __init__(
        self, head: nn.Module, features: Sequence[Tensor], samples: Sequence[Sample], collate: Collate, loss: Loss
    ) -> None:
        self.head, self.features, self.samples, self.collate, self.loss = head, features, samples, collate, loss

    @property
    def convex(self) -> bool:
        """Whether any start leads to the same end; with hidden layers a strong penalty ends where all is zero."""
        return sum(p.dim() > 1 for p in self.head.parameters() if p.requires_grad) == 1

    def batch(self, rows: Sequence[int]) -> Batch:
        """All these rows at once."""
        return _cached_batch(self.collate([self.samples[i] for i in rows]), [self.features[i] for i in rows])

    def fit(self, batch: Batch, penalty: float, iterations: int, start: nn.Module | None = None) -> nn.Module:
        """The best head for these rows, sought from `start`."""
        head = copy.deepcopy(start or self.head)
        model = _OnFeatures(head)
        params = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(
            params, max_iter=iterations, history_size=HISTORY, tolerance_grad=1e-7, tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            result = self.loss(model, batch)
            value = result.total / result.count
            for p in params:
                value = value + (0.5 * penalty * p.square().sum() if p.dim() > 1 else 0.0)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return head

    @torch.no_grad()
    def judged(self, head: nn.Module, batch: Batch) -> tuple[float, float]:
        """(sum of the loss of a head, its count) on some rows."""
        result = self.loss(_OnFeatures(head), batch)
        return float(result.total), result.count


def _best_penalty(problem: _Problem, seed: int) -> float:
    """The penalty with the lowest cross-validated loss; the middle one where there are too few rows to tell."""
    rows: dict[str, list[int]] = {}  # the samples of one row are never parted
    for i, sample in enumerate(problem.samples):
        rows.setdefault(sample.where, []).append(i)
    if len(rows) < 2 * FOLDS:
        return PENALTIES[len(PENALTIES) // 2]
    groups = list(rows.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    totals = dict.fromkeys(PENALTIES, 0.0)
    for fold in range(FOLDS):
        held = {i for g in order[fold::FOLDS] for i in groups[g]}
        rest, judge = ([i for i in range(len(problem.samples)) if (i in held) is side] for side in (False, True))
        training, judging = problem.batch(rest), problem.batch(judge)
        head: nn.Module | None = None
        for penalty in PENALTIES:
            head = problem.fit(training, penalty, TRIAL_ITERATIONS, head if problem.convex else None)
            totals[penalty] += problem.judged(head, judging)[0]
    return min(PENALTIES, key=lambda p: totals[p])
