"""The sweep verb: one recipe trained with many values, or cross-validated, and the best one found."""

import gc
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_ft import runs, search
from lora_ft.errors import ArtifactError, DataError, Interrupted, ResourceError, UsageError, did_you_mean
from lora_ft.recipe import Resolved
from lora_ft.records import Listener, Plan, Silent
from lora_ft.runs import Run
from lora_ft.search import Score, SweepOptions, SweepPlan, Task, TrialRow
from lora_ft.training import checkpoint

from .dry_run import dry_run
from .rows import Given
from .sweep_workers import run_workers, stopping
from .train_verb import train

FAILURES_SHOWN = 3


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        best_recipe: the whole recipe of the best trial.
        best_value: its metric.
        trials: all of them, best first.
        path: the sweep's folder: results.csv, results.json, best.yaml, and the trials' runs.
        plan: what was searched, and how.
    """

    best_recipe: Resolved
    best_value: float
    trials: Sequence[TrialRow]
    path: Path
    plan: SweepPlan


def sweep(
    resolved: Resolved | None = None,
    space: Sequence[str] = (),
    *,
    options: SweepOptions | None = None,
    out: Path | None = None,
    resume: bool = False,
    listener: Listener | None = None,
) -> SweepResult:
    """Train a recipe with the values of `space`, such as `method.r=4,8,16` or `train.learning_rate=1e-5..1e-3:log`.

    Args:
        resolved: the recipe; None only when a sweep is resumed, which has it.
        space: what varies; empty for a cross-validation of the recipe as it is.
        options: how to search.
        out: folder of the sweep; default sweeps/<name>-<date>-<time>.
        resume: go on with the sweep in `out`; also joins one that another process is at work on.
        listener: hears of each trial.

    Raises:
        LoraFtError: Interrupted after a signal; the others before or in the first trials.
    """
    options, listener = options or SweepOptions(), listener or Silent()
    path, plan = _open(resolved, space, options, out, resume)
    study = search.open_study(path, plan)
    try:
        if options.workers > 1:
            run_workers(path, plan, options, study, listener)
        else:
            with stopping():
                trainer = Trainer(plan, listener, options.trust_code)
                search.work(study, trainer, listener, trainer.check)
    except Interrupted as error:
        done = sum(r.status != "unfinished" for r in study.rows())
        raise Interrupted(
            f"sweep stopped; {done} of {plan.trials} trials are done",
            where=str(path),
            fix=f"lora-ft sweep --resume --out '{path}'",
        ) from error
    finally:
        listener.finish()
    return _result(path, plan, study.rows(), listener)


def _open(
    resolved: Resolved | None, space: Sequence[str], options: SweepOptions, out: Path | None, resume: bool
) -> tuple[Path, SweepPlan]:
    if resume:
        if out is None:
            raise UsageError("--resume needs the sweep's folder", fix="--resume --out DIR")
        plan = search.resume_plan(SweepPlan.read(out), resolved, space, options)
        plan.write(out)
        return out, plan
    if resolved is None:
        raise UsageError("no recipe given", fix="lora-ft sweep RECIPE.yaml --space method.r=4,8,16")
    plan = search.make_plan(resolved, space, options)
    path = out or Path("sweeps") / runs.default_path(resolved.name).name
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(
            "the output directory is in use",
            where=str(path),
            fix="--resume to go on with a sweep, or --out ANOTHER_DIR",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        plan.write(path)
    except OSError as error:
        raise ResourceError(f"the output directory cannot be written: {error.strerror}", where=str(path)) from error
    return path, plan


def _result(path: Path, plan: SweepPlan, rows: Sequence[TrialRow], listener: Listener) -> SweepResult:
    open_ones = [r.index for r in rows if r.status == "unfinished"]
    if open_ones:
        listener.warn(f"not finished: {len(open_ones)} trials that another process is at work on, or that it left")
    ordered = search.ranked(rows, plan.lower)
    best = search.best_of(rows, plan.lower)
    if best is None or best.value is None:
        failed = [f"trial {r.index}: {r.error or r.status}" for r in ordered[:FAILURES_SHOWN]]
        raise UsageError("no trial came to an end", where=str(path), why="; ".join(failed), fix="another --space")
    return SweepResult(search.with_settings(plan.base, best.settings), best.value, ordered, path, plan)


@dataclass(frozen=True)
class Trainer:
    """The objective: trains one trial, or each of its folds, and gives its score."""

    plan: SweepPlan
    listener: Listener
    trust_code: bool = False

    def __call__(self, task: Task) -> Score:
        """Train what is not trained yet."""
        resolved = search.with_settings(self.plan.base, task.settings)
        if self.plan.folds == 1:
            metrics = [self._train(resolved, task, task.folder, prunes=self.plan.prune)]
        else:
            metrics = list(self._folds(resolved, task))
        names = [n for n in metrics[0] if all(n in m for m in metrics)]
        means = {n: statistics.fmean(m[n] for m in metrics) for n in names}
        values = [m[self.plan.metric] for m in metrics]
        return Score(means[self.plan.metric], means, statistics.stdev(values) if len(values) > 1 else None)

    def check(self) -> None:
        """Raise where the recipe fails without any value of the space."""
        dry_run(self.plan.base, Silent(), Given(trust_code=self.trust_code))

    def _folds(self, resolved: Resolved, task: Task) -> Iterator[Mapping[str, float]]:
        values = []
        for fold in range(1, self.plan.folds + 1):
            part = search.with_settings(resolved, {"data.eval": f"fold {fold}/{self.plan.folds}"})
            metrics = self._train(part, task, task.folder / f"fold-{fold}", prunes=False)
            yield metrics
            values.append(metrics[self.plan.metric])
            task.report(fold, statistics.fmean(values), last=fold == self.plan.folds)

    def _train(self, resolved: Resolved, task: Task, path: Path, *, prunes: bool) -> Mapping[str, float]:
        """Metrics after training; an earlier attempt is gone on with, or taken as it is where it was complete."""
        run = Run(path)
        if not _is_done(run):
            resume = _can_resume(run, bool(resolved.stages))
            if not resume:
                shutil.rmtree(path, ignore_errors=True)  # a process died here before its first checkpoint
            watcher = _Watcher(self.plan.metric, task, run, self.listener, prunes)
            try:
                with _memory_errors(path):
                    given = Given(trust_code=self.trust_code)
                    run = train(resolved, out=path, resume=resume, listener=watcher, given=given)
            except search.Pruned:
                run.update({"status": "pruned", "error": None})
                self._tidy(run)
                raise
            except Interrupted:
                raise
            except Exception:
                self._tidy(run)
                raise
        self._tidy(run)
        after = run.metrics.get("after", {})
        _check_metric(self.plan.metric, after, path)
        return after

    def _tidy(self, run: Run) -> None:
        """Empty the checkpoint folders, those of stages too."""
        if not self.plan.keep_checkpoints:
            for path in run.path.glob("**/checkpoints/*"):
                shutil.rmtree(path, ignore_errors=True)


def _is_done(run: Run) -> bool:
    try:
        return bool(run.facts.get("status") == runs.STATUS_DONE)
    except ArtifactError:
        return False


def _can_resume(run: Run, stages: bool) -> bool:
    if stages:  # each stage sees to itself
        return run.checkpoints.is_dir() and (run.path / "run.json").is_file()
    try:
        checkpoint.latest(run.checkpoints)
    except ArtifactError:
        return False
    return True


def _check_metric(metric: str, there: Mapping[str, float], path: Path) -> None:
    if metric in there:
        return
    if not there:
        raise DataError("there are no held-out rows to judge a trial on", where=str(path), fix="--set data.eval=10%")
    raise UsageError(
        f"there is no metric {metric!r}; {did_you_mean(metric, there)}",
        where=str(path),
        why=f"this task has {', '.join(there)}",
        fix=f"--metric {next(iter(there))}",
    )


@contextmanager
def _memory_errors(path: Path) -> Iterator[None]:
    """Too little memory for one trial ends that trial only; what the one before held is given back first."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        what = f"not enough memory: {str(error).splitlines()[0] if str(error) else 'allocation failed'}"
        raise ResourceError(what, where=str(path), fix="--set train.tokens_per_micro_batch=512") from error


class _Watcher(Silent):
    """Listens to one training: shows how far it is, and ends it when it is not worth going on with."""

    def __init__(self, metric: str, task: Task, run: Run, listener: Listener, prunes: bool) -> None:
        self.metric, self.task, self.run, self.listener, self.prunes = metric, task, run, listener, prunes
        self.label = f"trial {task.index}" + (f", {run.path.name}" if run.path != task.folder else "")
        self.steps, self.done = 0, 0

    def warn(self, text: str) -> None:
        """Passed on, with the trial."""
        self.listener.warn(f"{self.label}: {text}")

    def start(self, plan: Plan) -> None:
        """A metric that does not exist is found before the training, not after it."""
        self.steps = plan.steps
        before = self.run.metrics.get("before")
        if before:
            _check_metric(self.metric, before, self.run.path)

    def step(self, record: Mapping[str, Any]) -> None:
        """Passed on as progress."""
        self.done = int(record["step"])
        self.listener.progress(self.label, self.done, self.steps)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ends the training of a trial that is worse than the median."""
        if self.prunes and self.metric in metrics:
            self.task.report(step, metrics[self.metric], last=step >= self.steps)
        elif self.prunes and self.task.index == 0:
            self.listener.note(f"no trial is pruned: {self.metric} is measured after training only")
            self.prunes = False

    def finish(self) -> None:
        """Close the bar of a training that ended before its last step."""
        if 0 < self.done < self.steps:
            self.listener.progress(self.label, self.done, self.done)
