"""What an evaluation decides: the best checkpoint, early stopping, reduce_lr_on_plateau. Its memory is `Progress`."""

import math
from collections.abc import Mapping

from lora_ft.errors import UsageError, nearest
from lora_ft.recipe import TrainSection
from lora_ft.records import lower_is_better

from .checkpoint import Progress


def check_metric(name: str, metrics: Mapping[str, float]) -> None:
    """Refuse a `train.metric_for_best_model` that is not among the held-out metrics.

    Raises:
        UsageError: names the metrics there are.
    """
    if name not in metrics:
        raise UsageError(
            f"train.metric_for_best_model: there is no held-out metric {name!r}",
            why=f"there are: {', '.join(sorted(metrics))}",
            fix=f"--set train.metric_for_best_model={next(iter(nearest(name, metrics)), 'loss')}",
        )


def take_in(progress: Progress, settings: TrainSection, metrics: Mapping[str, float]) -> bool:
    """Bring `progress` up to date with an evaluation; returns whether it is the best so far.

    A value that is not a number is no improvement. The plateau follows torch's ReduceLROnPlateau with its relative
    threshold, but of a negative metric too the threshold is a share of its size, so that standing still is no gain.
    """
    name = settings.metric_for_best_model
    check_metric(name, metrics)
    value, low = metrics[name], lower_is_better(name)
    best = _better(value, progress.best_value, low)
    if best:
        progress.best_value, progress.best_step = value, progress.step
    least = settings.early_stopping.min_delta if settings.early_stopping else 0.0
    if _better(value, progress.waited_value, low, least):
        progress.waited_value, progress.bad_evals = value, 0
    else:
        progress.bad_evals += 1
    if settings.lr_scheduler_type == "reduce_lr_on_plateau":
        _follow_plateau(progress, settings.schedule_options(), value, low)
    return best


def patience_is_over(progress: Progress, settings: TrainSection) -> bool:
    """Whether early stopping ends the training here."""
    stopping = settings.early_stopping
    return stopping is not None and progress.bad_evals >= stopping.patience


def _follow_plateau(progress: Progress, options: Mapping[str, float], value: float, low: bool) -> None:
    if _better(value, progress.plateau_value, low, options["threshold"] * abs(progress.plateau_value or 0.0)):
        progress.plateau_value, progress.plateau_evals = value, 0
        return
    progress.plateau_evals += 1
    if progress.plateau_evals > options["patience"]:
        progress.lr_scale *= options["factor"]
        progress.plateau_evals = 0


def _better(value: float, than: float | None, low: bool, least: float = 0.0) -> bool:
    """Whether `value` beats `than`, None for the first, by more than `least`."""
    if math.isnan(value) or than is None:
        return not math.isnan(value)
    return value < than - least if low else value > than + least
