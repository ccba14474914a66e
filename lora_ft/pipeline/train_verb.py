"""The train verb: one training, or several in a row."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ft import runs
from lora_ft.errors import ArtifactError, DivergedError, Interrupted, UsageError
from lora_ft.recipe import Resolved
from lora_ft.records import Listener, Silent
from lora_ft.registry import TASKS
from lora_ft.runs import Run
from lora_ft.training import checkpoint

from . import stages
from .dry_run import check
from .prepare import prepare, source_of
from .rows import Given
from .train_run import Training


def train(
    resolved: Resolved,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    listener: Listener | None = None,
    given: Given | None = None,
) -> Run:
    """Train as the recipe says and leave a run directory.

    Args:
        resolved: the recipe.
        out: run folder; default that of the recipe, or runs/<name>-<date>-<time>.
        overwrite: move a run that is in the way aside.
        resume: go on from the last checkpoint in `out`.
        listener: hears of progress.
        given: data or a model that the caller has in memory, and whether a recipe's own code may run.

    Raises:
        LoraFtError: of the kind that the exit code stands for; a started run keeps its checkpoints and its status.
    """
    listener = listener or Silent()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("training with several processes is not supported yet", fix="start lora-ft without a launcher")
    path = out or (Path(resolved.recipe.out) if resolved.recipe.out else runs.default_path(resolved.name))
    given = given or Given()
    if resolved.stages and not resume:
        _check_stages(resolved, listener, given)
    run = Run(path) if resume else runs.create(path, overwrite=overwrite)
    if resume and not run.checkpoints.is_dir():
        raise ArtifactError("there is no run to resume", where=str(path), fix="leave --resume out to start it")
    with runs.locked(run):
        checkpoint.clean(run.checkpoints)
        if resolved.stages:
            stages.begin(resolved, run, resume)
            with _status(run, lambda: True, listener):
                stages.train_stages(resolved, run, _trainer(listener, given), listener, given)
            return run
        training = Training(resolved, run, listener, given)
        with _status(run, lambda: training.begun, listener):
            training.run_all(resume)
    return run


def _check_stages(resolved: Resolved, listener: Listener, given: Given) -> None:
    """Find what is wrong with the last stage before the first one is trained."""
    stages.check(resolved, given)
    for stage in resolved.stages:
        recipe = stage.resolved.recipe
        source_of(recipe, TASKS.get(recipe.task.type), listener)  # a download is told of
        check(recipe, prepare(recipe, Silent(), given))


@contextmanager
def _status(run: Run, begun: Callable[[], bool], listener: Listener) -> Iterator[None]:
    """Write down how it ended when it did not end well."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        status = "diverged" if isinstance(error, DivergedError) else status
        if begun():  # a run that could not be resumed stays as it was
            run.update({"status": status, "error": str(getattr(error, "what", repr(error)))})
        raise
    finally:
        listener.finish()


def _trainer(listener: Listener, given: Given) -> Callable[[Resolved, Path, bool], Run]:
    def train_one(resolved: Resolved, folder: Path, resume: bool) -> Run:
        if not resume and folder.exists():
            shutil.rmtree(folder)  # it was killed before its first checkpoint
        return train(resolved, out=folder, resume=resume, listener=listener, given=given)

    return train_one
