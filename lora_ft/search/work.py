"""One worker: claims a trial, has it run, records what came of it, until none is left."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_ft.errors import DataError, Interrupted, LoraFtError, UsageError
from lora_ft.records import Listener

from .plan import SweepPlan
from .results import TrialRow, best_of

if TYPE_CHECKING:
    from .study import Claim, Study


class Pruned(Exception):
    """Raised through the training when a trial is not worth going on with."""


@dataclass(frozen=True)
class Score:
    """What a trial came to.

    Attributes:
        value: of the sweep's metric.
        metrics: all metrics after training.
        deviation: of the value over the folds.
    """

    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    deviation: float | None = None


class Task(Protocol):
    """A trial as the one who runs it sees it."""

    @property
    def index(self) -> int:
        """From 0."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Key -> text of the value, as after `--set`."""

    @property
    def folder(self) -> Path:
        """Of the trial's run; an earlier attempt may have left something there."""

    def report(self, step: int, value: float, *, last: bool = False) -> None:
        """An interim value; a step that was reported before counts once.

        Raises:
            Pruned: it is worse than the median of the finished trials, and this was not the last.
        """


Objective = Callable[[Task], Score]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: completed, pruned or failed."""

    status: str
    score: Score | None = None
    error: str = ""
    repeats: int | None = None


def open_study(out: Path, plan: SweepPlan) -> "Study":
    """The books of a sweep, made where they are missing.

    Raises:
        UsageError: Optuna is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UsageError("a sweep needs Optuna", fix="pip install 'lora-ft[search]'") from error
    from .study import Study

    return Study(out, plan)


def work(study: "Study", objective: Objective, listener: Listener, check: Callable[[], object] | None = None) -> None:
    """Run trials until none is left; those that fail with a message are recorded and the sweep goes on.

    Args:
        study: the books.
        objective: runs one trial.
        listener: hears of each.
        check: raises where the recipe is wrong as it is, whatever the values of the space.

    Raises:
        UsageError: before any trial came to an end, one failed, and not for its values.
        DataError: the same.
        LoraFtError: Interrupted; the trial is done again when the sweep is resumed.
    """
    while True:
        with study.claim() as claim:
            if claim is None:
                return
            listener.note(f"{_name(study, claim.index)} begins: {shown(claim.settings)}")
            started = time.monotonic()
            outcome = _attempt(study, claim, objective, check)
            study.finish(claim, outcome, round(time.monotonic() - started, 2))
        rows = study.rows()
        listener.note(outcome_line(study.plan, rows, claim.index))


def _attempt(
    study: "Study", claim: "Claim", objective: Objective, check: Callable[[], object] | None
) -> Outcome:  # fmt: skip
    twin = study.twin(claim)
    if twin is not None and twin.value is not None:
        return Outcome("completed", Score(twin.value, twin.metrics, twin.deviation), repeats=twin.index)
    try:
        claim.check_verdict()
        score = objective(claim)
    except Pruned:
        return Outcome("pruned")
    except Interrupted:
        raise
    except LoraFtError as error:
        if isinstance(error, UsageError | DataError) and not study.any_finished() and _fails_anyway(study.plan, check):
            raise
        return Outcome("failed", error="; ".join(t for t in (error.what, error.where, error.why) if t))
    if not math.isfinite(score.value):
        return Outcome("failed", error=f"{study.plan.metric} is {score.value}")
    return Outcome("completed", score)


def _fails_anyway(plan: SweepPlan, check: Callable[[], object] | None) -> bool:
    """Whether the recipe fails with any values: there is nothing to vary, or it is wrong as it is."""
    if not plan.axes:
        return True
    try:
        if check is not None:
            check()
    except (UsageError, DataError):
        return True
    return False


def outcome_line(plan: SweepPlan, rows: list[TrialRow], index: int) -> str:
    """A finished trial in one line."""
    row = rows[index]
    value = f"{plan.metric} {row.value:.4f}" if row.value is not None else row.error
    value += f" +- {row.deviation:.4f}" if row.deviation is not None else ""
    best = best_of(rows, plan.lower)
    notes = [f"{row.seconds or 0:.0f} s", shown(row.settings)]
    notes += [f"same values as trial {row.repeats}, not trained again"] if row.repeats is not None else []
    notes += ["best so far"] if best and best.index == index else []
    return f"trial {index} {row.status}: {value}, " + ", ".join(n for n in notes if n)


def _name(study: "Study", index: int) -> str:
    return f"trial {index} ({index + 1} of {study.plan.trials})"


def shown(settings: Mapping[str, str]) -> str:
    """The values of a trial in one line."""
    return ", ".join(f"{k} {_short(v)}" for k, v in settings.items()) or "the recipe as it is"


def _short(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
