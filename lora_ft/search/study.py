"""The books of a sweep, kept by Optuna in one journal file that several processes share.

Trial i of a sweep is Optuna's trial number i. Its sampler is seeded from (seed, i), so what it proposes depends on the
trials before it and on nothing else. A trial whose process died stays open in the journal; whoever can take its lock
goes on with it, with the same values. Everything that chooses a trial happens under one lock.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from lora_ft import runs
from lora_ft.errors import ResourceError
from lora_ft.runs import Run

from .plan import SweepPlan
from .results import TrialRow, write_results
from .space import Settings, combinations
from .work import Outcome, Pruned

NAME = "sweep"
JOURNAL, LOCKS = "journal.log", ".locks"
# Trials before TPE begins, and before the median prunes: sweeps here have 10 to 30 trials, Optuna's 10 would leave
# little to learn from.
STARTUP = 5
STATUS = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
STATES = {status: state for state, status in STATUS.items()}


class PerTrial(BaseSampler):
    """A sampler of its own for each trial, so that its proposals need no memory of the process."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.grid = combinations(plan.axes) if plan.search == "grid" else None
        self.inner: BaseSampler = RandomSampler()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose the trial's sampler."""
        seed = int(np.random.SeedSequence([self.plan.seed, trial.number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if self.grid is not None:
                self.inner = PartialFixedSampler(self.grid[trial.number], RandomSampler(seed))
            elif self.plan.search == "random":
                self.inner = RandomSampler(seed)
            else:
                # What others are at work on counts as bad, so that two workers do not try the same.
                self.inner = TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the trial's sampler does."""
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the trial's sampler does."""
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the trial's sampler does."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


class _SystemLock:
    """The journal's lock as one that the operating system frees when a process dies; Optuna's waits 30 s for that."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire(poll_interval=0.005)
        return True

    def release(self) -> None:
        self._lock.release()


@dataclass(frozen=True)
class Claim:
    """A trial that this worker alone runs."""

    index: int
    settings: Settings
    folder: Path
    trial: Trial
    prunes: bool

    def report(self, step: int, value: float, *, last: bool = False) -> None:
        """An interim value, kept under its place in the order of steps: trials with other batch sizes compare."""
        if not self.prunes:
            return
        steps: list[int] = self.trial.user_attrs.get("steps", [])
        if step not in steps:
            steps = [*steps, step]
            self.trial.set_user_attr("steps", steps)
        place = steps.index(step) + 1
        if place not in self.trial.study.get_trials(deepcopy=False)[self.index].intermediate_values:
            self.trial.report(value, place)
        if not last and self.trial.should_prune():
            self.trial.set_user_attr("verdict", "pruned")  # a process killed now must not train it to its end
            raise Pruned

    def check_verdict(self) -> None:
        """Raise Pruned for a trial whose process died just after it was found not worth going on with."""
        if self.trial.user_attrs.get("verdict") == "pruned":
            raise Pruned


class Study:
    """The books of the sweep in `out`."""

    def __init__(self, out: Path, plan: SweepPlan) -> None:
        self.out, self.plan = out, plan
        self.locks = out / LOCKS
        self.locks.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        lock = _SystemLock(self.locks / "journal")
        self._mend(lock)
        with warnings.catch_warnings(), self.alone():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the journal, in Optuna 4.0
            backend = JournalFileBackend(str(out / JOURNAL), lock_obj=lock)  # type: ignore[arg-type]
            self.study = optuna.create_study(
                storage=JournalStorage(backend),
                sampler=PerTrial(plan),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
                study_name=NAME,
                direction="minimize" if plan.lower else "maximize",
                load_if_exists=True,
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other worker chooses or ends a trial meanwhile."""
        with FileLock(self.locks / "study"):
            yield

    @contextmanager
    def claim(self) -> Iterator[Claim | None]:
        """A trial to run, held for as long as the block: one whose process died, or the next; None when all are out."""
        with ExitStack() as held:
            with self.alone():
                trial = self._orphan(held) or self._next(held)
                claim = self._claim(trial) if trial is not None else None
            yield claim

    def finish(self, claim: Claim, outcome: Outcome, seconds: float) -> None:
        """Record how a trial ended and write the tables anew."""
        score = outcome.score
        facts = {
            "seconds": seconds,
            "error": outcome.error,
            "repeats": outcome.repeats,
            "metrics": dict(score.metrics) if score else {},
            "deviation": score.deviation if score else None,
        }
        with self.alone():
            claim.trial.set_user_attr("facts", facts)
            value = score.value if score else None
            self.study.tell(claim.trial, value, state=STATES[outcome.status])
            write_results(self.out, self.plan, self.rows())

    def twin(self, claim: Claim) -> TrialRow | None:
        """An earlier trial with the same values that came to an end."""
        return next((r for r in self.rows() if r.status == "completed" and r.settings == claim.settings), None)

    def any_finished(self) -> bool:
        """Whether any trial was trained without an error."""
        return any(r.status in ("completed", "pruned") for r in self.rows())

    def rows(self) -> list[TrialRow]:
        """All trials, in order."""
        return [_row(t) for t in self.study.get_trials(deepcopy=False)]

    def _orphan(self, held: ExitStack) -> Trial | None:
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            try:
                self._hold(frozen.number, held)
            except ResourceError:
                continue  # somebody is at work on it
            return Trial(self.study, frozen._trial_id)
        return None

    def _next(self, held: ExitStack) -> Trial | None:
        if len(self.study.get_trials(deepcopy=False)) >= self.plan.trials:
            return None
        trial = self.study.ask()
        self._hold(trial.number, held)
        return trial

    def _hold(self, index: int, held: ExitStack) -> None:
        path = self.locks / _folder(index)
        path.mkdir(exist_ok=True)
        held.enter_context(runs.locked(Run(path)))

    def _claim(self, trial: Trial) -> Claim:
        settings = {axis.key: axis.suggest(trial) for axis in self.plan.axes}
        trial.set_user_attr("index", trial.number)
        trial.set_user_attr("settings", settings)
        folder = self.out / "trials" / _folder(trial.number)
        folder.parent.mkdir(exist_ok=True)
        return Claim(trial.number, settings, folder, trial, self.plan.prune)

    def _mend(self, lock: _SystemLock) -> None:
        """Cut off the line that a killed process did not write to its end; Optuna would trip over it."""
        path = self.out / JOURNAL
        lock.acquire()
        try:
            if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
                with path.open("rb+") as file:
                    file.truncate(text.rfind(b"\n") + 1)
        finally:
            lock.release()


def _folder(index: int) -> str:
    return f"{index:04d}"


def _row(trial: FrozenTrial) -> TrialRow:
    facts: Mapping[str, Any] = trial.user_attrs.get("facts", {})
    return TrialRow(
        index=trial.number,
        settings=trial.user_attrs.get("settings", {}),
        status=STATUS.get(trial.state, "unfinished"),
        value=trial.value,
        folder=f"trials/{_folder(trial.number)}",
        **facts,
    )
