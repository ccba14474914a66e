"""Several trainings in a row, each on top of the one before, and the last one also without them for comparison.

RUN/stages/1-NAME ... N-NAME are ordinary runs; RUN/stages/baseline is the last one without the others. RUN/run.json
names the last as `final`, which is what predict, merge and the other verbs use.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ft import runs
from lora_ft.errors import ArtifactError, Interrupted, Problem, UsageError
from lora_ft.evaluate import compare
from lora_ft.models.body import keep_body
from lora_ft.models.resolve import resolve
from lora_ft.recipe import Recipe, Resolved
from lora_ft.records import Listener
from lora_ft.runs import Run

from .artifacts import merge
from .rows import Given, absolute, absolute_sets
from .start import is_free

FOLDER = "stages"
BASELINE = "baseline"
TrainOne = Callable[[Resolved, Path, bool], Run]  # recipe, folder, whether to resume


def check(resolved: Resolved, given: Given) -> None:
    """Refuse stages that cannot stand on each other.

    Args:
        resolved: a recipe with stages.
        given: what the caller has in memory; stages take data and model from their recipes.

    Raises:
        UsageError: names every stage that does not fit the one before.
    """
    if given.train is not None or given.held_out is not None or given.model is not None:
        raise UsageError(
            "stages: data or a model in memory would be those of every stage",
            fix="name files in the recipe, or train one stage after the other with start_from",
        )
    problems = []
    for before, stage in zip(resolved.stages, resolved.stages[1:], strict=False):
        for what in _misfits(before.resolved.recipe, stage.resolved.recipe, stage.adapter):
            problems.append(Problem(f"stages: {stage.name} has {what}, unlike {before.name} before it"))
    if problems:
        fix = "write these keys at the top of the recipe, for all stages; or adapter: new for another method"
        raise UsageError.collect(problems, title=f"{len(problems)} stages do not fit", fix=fix)


def _misfits(before: Recipe, recipe: Recipe, adapter: str) -> list[str]:
    """What of a recipe must be as in the stage before, and is not."""
    pairs: dict[str, tuple[Any, Any]] = {"model": (before.model, recipe.model)}
    pairs["start_from"] = (None, recipe.start_from if recipe.start_from != before.start_from else None)
    if adapter == "same":
        old, new = before.method.options(), recipe.method.options()
        pairs["method"] = (before.method.type, recipe.method.type)
        pairs |= {f"method.{k}": (old.get(k), new.get(k)) for k in (old | new) if not is_free(k)}
        pairs["data.add_tokens"] = (before.data.add_tokens, recipe.data.add_tokens)
    return [f"{key}: {new}" for key, (old, new) in pairs.items() if old != new]


def train_stages(resolved: Resolved, run: Run, train_one: TrainOne, listener: Listener, given: Given) -> None:
    """Train every stage that is not finished yet, and compare.

    Args:
        resolved: a recipe with stages.
        run: the run of all, begun and locked by the caller.
        train_one: trains one stage in its folder.
        listener: hears of progress.
        given: for merging a stage, whether code may run.

    Raises:
        Interrupted: in one of the stages; the run of all is what can be resumed.
    """
    try:
        done = _all(resolved, run, train_one, listener, given)
        facts: dict[str, Any] = {"status": runs.STATUS_DONE}
        if resolved.baseline:
            listener.note("baseline: the last stage without the others")
            alone = _train(resolved.stages[-1].resolved, run.path / FOLDER / BASELINE, train_one)
            facts["comparison"] = comparison(alone, done)
    except Interrupted as error:
        fix = f"lora-ft train --resume --out {run.path}"
        raise Interrupted(error.what, where=error.where, why=error.why, fix=fix) from error
    run.update(facts)


def begin(resolved: Resolved, run: Run, resume: bool) -> None:
    """Write down what was asked for, once; a resumed run must ask for the same.

    Raises:
        ArtifactError: it asks for something else; the run stays as it was.
    """
    whole = replace(resolved, values=_absolute(resolved.values))
    text = json.dumps({k: v for k, v in whole.values.items() if k != "out"}, sort_keys=True)
    if not resume:
        runs.write_text(run.path / "recipe.resolved.yaml", whole.text({("out",): (str(run.path), "this run")}))
    elif run.facts.get("stages_recipe") != text:
        raise ArtifactError(
            "this run was started with another recipe",
            where=str(run.path),
            why="its stages or the keys that they share differ from recipe.resolved.yaml there",
            fix=f"lora-ft train --resume --out {run.path} goes on with that; another --out starts anew",
        )
    run.update({"status": "running", "stages_recipe": text, "error": None})


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as YAML gives them back, their paths absolute, so that they can be read from any folder."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    for part in (found, *found[FOLDER]):
        for key in ("model", "start_from"):
            if part.get(key):
                part[key] = absolute(part[key])
        data = part["data"] if isinstance(part.get("data"), dict) else {}
        if data.get("train"):
            data["train"] = absolute_sets(data["train"])
        if data.get("eval"):
            data["eval"] = absolute(data["eval"])
    return found


def _all(resolved: Resolved, run: Run, train_one: TrainOne, listener: Listener, given: Given) -> Run:
    """Every stage on the one before; the run of the last."""
    base, done = resolved.stages[0].resolved.recipe.model, run
    for number, stage in enumerate(resolved.stages, 1):
        recipe, label = stage.resolved, f"{number}-{stage.name}"
        listener.note(f"stage {number} of {len(resolved.stages)}: {stage.name} ({recipe.recipe.task.type})")
        if number > 1 and stage.adapter == "same":
            recipe = _with(recipe, {"model": base, "start_from": str(done.path.resolve())})
        elif number > 1:
            base = _merged(done, base, listener, given)
            recipe = _with(recipe, {"model": base, "start_from": None})
        done = _train(recipe, run.path / FOLDER / label, train_one)
        run.update({"final": f"{FOLDER}/{label}", "metrics": done.metrics})
    return done


def _merged(before: Run, base: str, listener: Listener, given: Given) -> str:
    """The base with the adapter of a stage in it, as a folder."""
    folder = before.path / "merged"
    if not folder.is_dir():
        listener.note(f"merging {before.path.name} into the base for the next stage")
        merge(before, folder, dtype="float32", listener=listener, given=given)
    kept = keep_body(resolve(base, listener.note), folder)
    if kept:
        listener.note(f"{len(kept)} tensors of the base that this stage had no use for are kept ({kept[0]})")
    return str(folder.resolve())


def comparison(alone: Run, staged: Run) -> dict[str, Any]:
    """The held-out metrics of both runs, and which rows flip; the interval is a paired bootstrap over rows."""
    found: dict[str, Any] = {"without": alone.metrics.get("after", {}), "with": staged.metrics.get("after", {})}
    before, after = _right(alone), _right(staged)
    if before and len(before) == len(after):
        paired = compare(before, after)
        found |= {
            "gained": len(paired.gained), "lost": len(paired.lost), "difference": paired.difference,
            "interval_95": [paired.low, paired.high],
        }  # fmt: skip
    return found


def _right(run: Run) -> list[bool]:
    path = run.path / "right-after.json"
    found: list[bool] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def _train(resolved: Resolved, folder: Path, train_one: TrainOne) -> Run:
    """The stage's run, trained now unless it is finished; what was begun is gone on with where it has a checkpoint."""
    run = Run(folder)
    if (folder / "run.json").is_file() and run.facts.get("status") == runs.STATUS_DONE:
        return run
    started = any(run.checkpoints.glob("step-*")) if run.checkpoints.is_dir() else False
    return train_one(resolved, folder, started)


def _with(resolved: Resolved, values: Mapping[str, str | None]) -> Resolved:
    origins = dict(resolved.origins)
    for key in values:
        origins[key,] = "the stage before"
    return replace(resolved, recipe=resolved.recipe.model_copy(update=dict(values)), origins=origins)
