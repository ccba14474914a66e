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
from lora_ft.errors import ArtifactError
from lora_ft.evaluate import compare
from lora_ft.recipe import Resolved, Stage
from lora_ft.records import Listener
from lora_ft.runs import Run

from .rows import Given
from .use import merge

FOLDER = "stages"
BASELINE = "baseline"
TrainOne = Callable[[Resolved, Path, bool], Run]  # recipe, folder, whether to resume


def train_stages(
    resolved: Resolved, run: Run, train_one: TrainOne, *, resume: bool, listener: Listener, given: Given
) -> None:
    """Train every stage that is not finished yet, and compare.

    Args:
        resolved: a recipe with stages.
        run: the run of all; locked by the caller.
        train_one: trains one stage in its folder.
        resume: whether earlier work in the folders may be gone on with.
        listener: hears of progress.
        given: for merging a stage of a user's own model.

    Raises:
        ArtifactError: `resume` with another recipe.
    """
    text = json.dumps(resolved.values, sort_keys=True, default=str)
    if resume and run.facts.get("stages_recipe") != text:
        raise ArtifactError("this run was started with other stages", where=str(run.path), fix="start anew in --out")
    runs.write_text(run.path / "recipe.resolved.yaml", resolved.text())
    run.update({"status": "running", "stages_recipe": text, "error": None})
    before: Run | None = None
    done: Run | None = None
    for number, stage in enumerate(resolved.stages, 1):
        before = done
        label = f"{number}-{stage.name}"
        listener.note(f"stage {number} of {len(resolved.stages)}: {stage.name} ({stage.resolved.recipe.task.type})")
        recipe = _on_top_of(stage, before, listener, given)
        done = _train(recipe, run.path / FOLDER / label, train_one)
        run.update({"final": f"{FOLDER}/{label}", "metrics": done.metrics})
    facts: dict[str, Any] = {"status": runs.STATUS_DONE}
    if resolved.baseline and done is not None:
        listener.note("baseline: the last stage without the others")
        alone = _train(resolved.stages[-1].resolved, run.path / FOLDER / BASELINE, train_one)
        facts["comparison"] = comparison(alone, done)
    run.update(facts)


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


def _on_top_of(stage: Stage, before: Run | None, listener: Listener, given: Given) -> Resolved:
    """The stage's recipe on the result of the one before."""
    if before is None:
        return stage.resolved
    if stage.adapter == "same":
        return _with(stage.resolved, {"start_from": str(before.path.resolve())})
    merged = before.path / "merged"
    if not merged.is_dir():
        listener.note(f"merging {before.path.name} into the base for the next stage")
        merge(before, merged, dtype="float32", listener=listener, given=given)
    return _with(stage.resolved, {"model": str(merged.resolve())})


def _with(resolved: Resolved, values: Mapping[str, str]) -> Resolved:
    origins = dict(resolved.origins)
    for key in values:
        origins[key,] = "the stage before"
    return replace(resolved, recipe=resolved.recipe.model_copy(update=dict(values)), origins=origins)
