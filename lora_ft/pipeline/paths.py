"""Which form of the loss is trained with: the fastest that equals the plain one on the first samples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lora_ft.errors import UsageError
from lora_ft.media import Media
from lora_ft.recipe import Recipe
from lora_ft.records import Batch, LossSum, Sample, moved
from lora_ft.registry import Task
from lora_ft.training.batching import step_samples
from lora_ft_adapters import AdapterError, trainable, training_mode
from lora_ft_adapters.copies import is_copy
from lora_ft_adapters.fast.lora import Lean
from lora_ft_adapters.fast.verify import Verdict, verify

from .prepare import Prepared

VERIFY_SAMPLES = 4
VERIFY_TOKENS = 1024
LossFn = Callable[[Any, Batch], LossSum]


@dataclass(frozen=True)
class LossPath:
    """How losses are computed.

    Attributes:
        loss: model, batch -> LossSum.
        represent: the same path to what a whole-step loss combines.
        note: which path it is, and why.
    """

    loss: LossFn
    represent: Callable[[Any, Batch], torch.Tensor]
    note: str


def choose_path(recipe: Recipe, prepared: Prepared, model: Any, dtype: torch.dtype) -> LossPath:
    """The fastest loss that equals the plain one on the first samples; every adapter tensor must get a gradient."""
    task = prepared.task
    batch = check_batch(recipe, prepared, next(model.parameters()).device)
    named = list(trainable(model))
    parameters = [p for _, p in named]
    plain = partial(_total, task.loss, model, batch)
    refused: list[str] = []
    unused: list[str] = []
    training_mode(model)
    try:
        for path in _candidates(task, model):
            verdict = verify(partial(_total, path.loss, model, batch), plain, parameters, dtype)
            unused = _check_reached(named, verdict)
            if verdict.exact:
                note = f"{path.note}: gradient equal to the plain one to {verdict.gradient_error:.0e}"
                return replace(path, note="; ".join([note, *refused, *unused]))
            refused.append(f"{path.note} is off: {verdict.reason}")
        if not refused:
            unused = _check_reached(named, verify(plain, plain, parameters, dtype))
    finally:
        model.eval()
    return LossPath(task.loss, task.represent, "; ".join(["plain loss", *refused, *unused]))


def check_batch(recipe: Recipe, prepared: Prepared, device: torch.device) -> Batch:
    """The shortest samples of the first step, few enough that the plain path's full logits fit where training fits.

    Where some rows have images and others none, those that use the whole model come first.
    """
    rows = step_samples(0, len(prepared.train), recipe.train.batch_size, recipe.seed)
    samples = sorted((prepared.train[i] for i in rows), key=_least_first)
    if not _has_media(samples[0]):
        samples = sorted([*samples, *filter(_has_media, prepared.train)], key=_least_first)
    samples = samples[:VERIFY_SAMPLES]
    chosen = [s for n, s in enumerate(samples, 1) if n == 1 or n * s.length <= VERIFY_TOKENS]
    batch: Batch = moved(prepared.task.collate(chosen, prepared.processor), device)
    return batch


def _least_first(sample: Sample) -> tuple[bool, int]:
    return not _has_media(sample), sample.length


def _has_media(sample: Sample) -> bool:
    """Whether it holds an image or sound, alone or in a mapping of several."""
    return any(isinstance(v, Media) or (isinstance(v, Mapping) and len(v) > 0) for v in sample.inputs.values())


def _total(loss: LossFn, model: Any, batch: Batch) -> torch.Tensor:
    return loss(model, batch).total


def _candidates(task: Task, model: Any) -> Iterator[LossPath]:
    """Fast paths, the fastest first."""
    try:
        lean = Lean(model)
    except AdapterError:
        pass  # another method than LoRA
    else:

        def loss(model: Any, batch: Batch) -> LossSum:
            with lean:
                return task.fast_loss(model, batch)

        def represent(model: Any, batch: Batch) -> torch.Tensor:
            with lean:
                return task.represent(model, batch)

        yield LossPath(loss, represent, ", ".join(n for n in (task.fast_note, "lean LoRA") if n))
    if task.fast_note:
        yield LossPath(task.fast_loss, task.represent, task.fast_note)


def _check_reached(named: list[tuple[str, Any]], verdict: Verdict) -> list[str]:
    """A note on copies of the base's own parameters that this task does not use; anything else is an error.

    Full fine-tuning copies all there is, and many models hold a few tensors that one task does not read (the last norm
    of a vision tower of which an earlier block is read). An adapter without a gradient was put in a wrong place.
    """
    names = [named[i][0] for i in verdict.unreached]
    if not names:
        return []
    if all(is_copy(n) for n in names) and 2 * len(names) < len(named):
        return [
            f"{len(names)} of {len(named)} tensors are not used by this task and stay as they are, such as {names[0]}"
        ]
    raise UsageError(
        f"no gradient reaches {len(names)} of {len(named)} adapter tensors, for example {names[0]}",
        where="method.target_modules",
        fix="leave out modules that this task does not use",
    )
