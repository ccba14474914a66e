"""What a sweep is: checked before anything runs, kept in sweep.json, and the same when it is resumed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lora_ft import runs
from lora_ft.errors import ArtifactError, Problem, UsageError, did_you_mean
from lora_ft.recipe import Resolved, load_recipe
from lora_ft.records import lower_is_better

from .space import Axis, check_space, combinations, parse_space, plain_values

SEARCHES = ("grid", "random", "bayes")
DEFAULT_TRIALS = 20
FILE = "sweep.json"
SAME = ("recipe", "space", "search", "metric", "folds", "seed", "prune")  # in every part of one sweep


@dataclass(frozen=True)
class SweepOptions:
    """How to search; None is the default, or when a sweep is resumed what it had.

    Attributes:
        search: grid (every combination), random, or bayes (TPE); default bayes.
        trials: how many in all; default every combination for grid, else 20 or all combinations if there are fewer.
        metric: of the held-out rows after training; default loss.
        folds: parts of a cross-validation, 1 for none.
        seed: of the proposals.
        prune: whether trials that do worse than the median at an evaluation stop; default yes, not for grid or stages.
        workers: processes.
        keep_checkpoints: whether those of finished trials stay.
        trust_code: whether a recipe's own Python function may run.
    """

    search: str | None = None
    trials: int | None = None
    metric: str | None = None
    folds: int | None = None
    seed: int | None = None
    prune: bool | None = None
    workers: int = 1
    keep_checkpoints: bool = False
    trust_code: bool = False


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep; the attributes are those of `SweepOptions`, with nothing left open.

    Attributes:
        recipe: the whole base recipe, without `out`.
        origins: where its values came from, for the recipes that are written.
        name: of the recipe.
        space: the axes as the user wrote them.
    """

    recipe: Mapping[str, Any]
    origins: tuple[tuple[tuple[str, ...], str], ...]
    name: str
    space: tuple[str, ...]
    search: str
    metric: str
    trials: int
    folds: int
    seed: int
    prune: bool
    keep_checkpoints: bool = field(default=False)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The space, parsed."""
        return parse_space(self.space)

    @property
    def base(self) -> Resolved:
        """The recipe that trials vary."""
        return replace(load_recipe([self.recipe]), origins=dict(self.origins), name=self.name)

    @property
    def lower(self) -> bool:
        """Whether a smaller value is the better one."""
        return lower_is_better(self.metric)

    def write(self, out: Path) -> None:
        """Keep it in the sweep's folder."""
        runs.write_text(out / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, out: Path) -> "SweepPlan":
        """The plan of a sweep's folder.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        try:
            kept = json.loads((out / FILE).read_text(encoding="utf-8"))
            values = {f.name: kept[f.name] for f in fields(cls)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError("there is no sweep to resume", where=str(out), why=f"{FILE}: {error}") from error
        values["space"] = tuple(values["space"])
        values["origins"] = tuple((tuple(path), origin) for path, origin in values["origins"])
        return cls(**values)


def make_plan(resolved: Resolved, space: Sequence[str], options: SweepOptions) -> SweepPlan:
    """A new sweep.

    Raises:
        UsageError: nothing to search, a key or value that does not fit the recipe, options that contradict each other.
    """
    axes = parse_space(space)
    folds = 1 if options.folds is None else options.folds
    if not axes and folds < 2:
        raise UsageError(
            "there is nothing to search", fix="--space train.learning_rate=1e-5..1e-3:log, or --folds 5 for one recipe"
        )
    search = options.search or ("bayes" if axes else "grid")
    if search not in SEARCHES:
        raise UsageError(f"unknown search {search!r}; {did_you_mean(search, SEARCHES)}", fix="--search bayes")
    _check(resolved, search, folds, options)
    check_space(resolved, axes)
    usual = bool(axes) and search != "grid" and not resolved.stages
    return SweepPlan(
        recipe=plain_values(resolved),
        origins=tuple((path, origin) for path, origin in resolved.origins.items() if path != ("out",)),
        name=resolved.name,
        space=tuple(space),
        search=search,
        metric=options.metric or "loss",
        trials=_trials(axes, search, options.trials),
        folds=folds,
        seed=options.seed or 0,
        prune=usual if options.prune is None else options.prune and bool(axes),
        keep_checkpoints=options.keep_checkpoints,
    )


def _check(resolved: Resolved, search: str, folds: int, options: SweepOptions) -> None:
    if resolved.recipe.data.eval is None and folds < 2:
        raise UsageError("a sweep needs held-out rows, but data.eval is null", fix="--set data.eval=10%, or --folds 5")
    if search == "grid" and options.prune:
        raise UsageError("grid search runs every combination to its end", fix="leave --prune out, or --search random")
    if resolved.stages and (folds > 1 or options.prune):
        given = "--folds" if folds > 1 else "--prune"
        raise UsageError(f"{given} does not go with a recipe that has stages", fix=f"leave {given} out")
    for name, value, least in (("trials", options.trials, 1), ("folds", options.folds, 1), ("seed", options.seed, 0)):
        if value is not None and value < least:
            raise UsageError(f"--{name} is at least {least}, got {value}")
    if options.workers < 1:
        raise UsageError(f"--workers is at least 1, got {options.workers}")


def _trials(axes: Sequence[Axis], search: str, asked: int | None) -> int:
    every = combinations(axes)
    if search != "grid":
        return asked or min(DEFAULT_TRIALS, len(every) if every else DEFAULT_TRIALS)
    if every is None:
        raise UsageError(
            "grid search needs lists, but the space has a range",
            fix="low..high:5 for five points of it, or --search random",
        )
    if asked not in (None, len(every)):
        raise UsageError(f"grid search runs all {len(every)} combinations, not {asked}", fix="leave --trials out")
    return len(every)


def resume_plan(kept: SweepPlan, resolved: Resolved | None, space: Sequence[str], options: SweepOptions) -> SweepPlan:
    """The kept plan, with more trials if asked for; what is not given is as it was.

    Raises:
        UsageError: what is given differs; names each difference.
    """
    given = replace(
        options,
        search=options.search or kept.search,
        metric=options.metric or kept.metric,
        folds=kept.folds if options.folds is None else options.folds,
        seed=kept.seed if options.seed is None else options.seed,
        prune=kept.prune if options.prune is None else options.prune,
        trials=kept.trials if options.trials is None else options.trials,
    )
    new = make_plan(resolved or kept.base, tuple(space) or kept.space, given)
    problems = [p for name in SAME for p in _differences(name, getattr(kept, name), getattr(new, name))]
    if problems:
        raise UsageError.collect(
            problems, title="this is not the sweep that is resumed", fix="the same options, or another --out"
        )
    if new.trials < kept.trials:
        raise UsageError(f"--trials can grow from {kept.trials}, not shrink to {new.trials}", fix="leave --trials out")
    return replace(kept, trials=new.trials, keep_checkpoints=options.keep_checkpoints)


def _differences(name: str, old: Any, new: Any) -> list[Problem]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = {**old, **new}
        return [p for k in keys for p in _differences(f"{name}.{k}", old.get(k), new.get(k))]
    old, new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
    return [] if old == new else [Problem(f"{name} was {old!r}, now {new!r}")]
