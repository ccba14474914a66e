"""One adapter in fewer numbers, or as a plain LoRA: truncated SVD of the change of every module."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn

from lora_ft_adapters.errors import AdapterError

from .deltas import Delta, LayerDelta
from .factor import Cut, spectrum
from .result import LoraResult, factorise
from .source import share

# What is left out falls by 2x from one step of the energy ladder to the next; below this share it is float32 noise.
SMALLEST_LOSS = 1e-6


@dataclass(frozen=True)
class Guard:
    """What a smaller adapter must still do.

    Attributes:
        metric: model with an adapter -> a number for which lower is better, such as a held-out loss.
        tolerance: how far the metric may be above that of the whole adapter.
        base: the model without adapters.
        task_type: PEFT's name for the task.
    """

    metric: Callable[[Any], float]
    tolerance: float
    base: nn.Module
    task_type: str | None = None


@dataclass(frozen=True)
class Compressed:
    """A smaller adapter and what the guard measured.

    Attributes:
        result: the adapter.
        cut: what it keeps.
        whole: metric of the whole adapter, None without a guard.
        kept: metric of the smaller one, None without a guard.
        tried: how many candidates were measured.
    """

    result: LoraResult
    cut: Cut
    whole: float | None = None
    kept: float | None = None
    tried: int = 0


def compress(
    adapter: Mapping[str, Delta], *, rank: int | None = None, energy: float | None = None, guard: Guard | None = None
) -> Compressed:
    """The best LoRA of a given rank or kept energy, by truncated SVD of each module (Eckart and Young 1936).

    With a guard, `rank` or `energy` (default rank 1) is the smallest that is tried, and the smallest at or above it
    that keeps the metric is found by bisection, which takes the metric to rise as the adapter shrinks.

    Args:
        adapter: module name -> change.
        rank: most singular values for each module.
        energy: share of the sum of squared singular values to keep in each module.
        guard: what the smaller adapter must still do.

    Raises:
        AdapterError: neither or both of rank and energy, or the guard's metric is no number.
    """
    if rank is not None and energy is not None:
        raise AdapterError("give rank or energy, not both")
    if guard is None:
        if rank is None and energy is None:
            raise AdapterError("compress needs a rank, an energy, or a guard")
        cut = Cut(rank, energy)
        return Compressed(factorise(adapter.items(), cut), cut)
    deltas = list(adapter.items())
    spectra = {id(d): spectrum(d) for _, d in deltas if isinstance(d, LayerDelta)}

    def made(cut: Cut) -> LoraResult:
        return factorise(deltas, cut, decompose=lambda d: spectra[id(d)])

    full = made(Cut())
    ladder = _energies(energy) if energy is not None else [Cut(r) for r in range(rank or 1, full.rank)]
    return _search(made, [*ladder, Cut()], guard)


def _energies(lowest: float) -> list[Cut]:
    """Cuts that lose 1 - lowest of the energy, half of that, a quarter, ..."""
    Cut(energy=lowest)  # refuses what is no share
    losses = [(1 - lowest) * 0.5**i for i in range(40)]
    return [Cut(energy=1 - loss) for loss in losses if loss >= SMALLEST_LOSS]


def _search(made: Callable[[Cut], LoraResult], ladder: Sequence[Cut], guard: Guard) -> Compressed:
    """Bisection over a ladder whose last rung is the whole adapter."""
    whole = _measure(guard, made(ladder[-1]))
    low, high, tried = 0, len(ladder) - 1, 1
    best = Compressed(made(ladder[-1]), ladder[-1], whole, whole, tried)
    while low < high:
        middle = (low + high) // 2
        result = made(ladder[middle])
        value, tried = _measure(guard, result), tried + 1
        if value <= whole + guard.tolerance:
            high, best = middle, Compressed(result, ladder[middle], whole, value, tried)
        else:
            low = middle + 1
    return Compressed(best.result, best.cut, whole, best.kept, tried)


def _measure(guard: Guard, result: LoraResult) -> float:
    value = float(guard.metric(attach(result, guard.base, guard.task_type)))
    if not torch.isfinite(torch.tensor(value)):
        raise AdapterError(f"the guard's metric is {value}")
    return value


def convert(
    adapter: Mapping[str, Delta], *, rank: int | None = None, energy: float | None = None
) -> LoraResult:  # fmt: skip
    """Any method that can be merged, as a plain LoRA; exact to float32 when neither rank nor energy is given.

    Raises:
        AdapterError: both rank and energy, or nothing changes.
    """
    if rank is not None and energy is not None:
        raise AdapterError("give rank or energy, not both")
    return factorise(adapter.items(), Cut(rank, energy))


def attach(result: LoraResult, base: nn.Module, task_type: str | None = None) -> Any:
    """A PeftModel in evaluation mode with the result on a copy of `base` that shares its weights."""
    with warnings.catch_warnings():
        # PEFT's remarks on models without a Transformers config, and its use of a renamed Transformers attribute.
        warnings.simplefilter("ignore")
        model = get_peft_model(share(base), result.config(base, task_type=task_type))
        unexpected: list[str] = set_peft_model_state_dict(model, result.tensors()).unexpected_keys  # type: ignore[attr-defined]
    if unexpected:
        raise AdapterError(f"PEFT has no place for {unexpected[0]}")
    return model.eval()
