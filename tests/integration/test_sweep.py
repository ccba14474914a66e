"""A sweep of real trainings on a tiny model, killed, stopped, shared and cross-validated."""

import json
import os
import signal
import statistics
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from lora_ft.cli.sweep import sweep as sweep_command
from lora_ft.errors import DataError, Interrupted, ResourceError, UsageError
from lora_ft.pipeline.sweep import sweep
from lora_ft.pipeline.sweep_workers import raise_first
from lora_ft.recipe import load_recipe, write_yaml
from lora_ft.records import Silent
from lora_ft.runs import Run
from lora_ft.search import SweepOptions
from tests.integration.runs import records

SPACE = ["train.learning_rate=1e-4..1e-1:log", "method.r=2,4,8"]
# Dies in trial 6, in the step after its first checkpoint, before it is judged and could be pruned.
KILLED = """
import os, signal, sys
from pathlib import Path
from lora_ft.pipeline.sweep import sweep
from lora_ft.records import Silent

class Dies(Silent):
    def progress(self, what, done, total):
        if (what, done) == ("trial 6", 2):
            os.kill(os.getpid(), signal.SIGKILL)

sweep(None, out=Path(sys.argv[1]), resume=True, listener=Dies())
"""


class Stops(Silent):
    """Has the process told to stop once, at a step of a trial."""

    def __init__(self, what, step):
        self.at = (what, step)

    def progress(self, what, done, total):
        if (what, done) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def quick(recipe):
    """A recipe that is judged twice in four steps and saved after each."""
    train = {"steps": 4, "eval_every": 2, "save_every": 1, "dtype": "float32", "batch_size": 8}
    return {**recipe, "train": train, "eval": {"generate": 0}}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The verb on an app of its own; gives (stdout, stderr) or raises."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(sweep_command)

    def call(*words):
        result = CliRunner().invoke(app, [str(w) for w in words])
        if result.exception is not None:
            raise result.exception
        return result.stdout, result.stderr

    return call


def facts(result):
    return sorted((t.index, tuple(t.settings.items()), t.status, t.value) for t in result.trials)


def test_a_sweep_killed_half_way_and_resumed_equals_an_uninterrupted_one(quick, tmp_path):
    options = SweepOptions("bayes", 12, seed=1)
    whole = sweep(load_recipe([quick]), SPACE, options=options, out=tmp_path / "whole")
    assert {t.status for t in whole.trials} == {"completed", "pruned"}
    (tmp_path / "cut").mkdir()
    whole.plan.write(tmp_path / "cut")
    dead = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "cut")], check=False)
    assert dead.returncode == -signal.SIGKILL
    left = Run(tmp_path / "cut" / "trials" / "0006")
    assert left.facts["status"] == "running"
    assert [p.name for p in left.checkpoints.iterdir()] == ["step-00000001"]
    begun = left.facts["metrics"]["before"]

    resumed = sweep(load_recipe([quick]), SPACE, options=options, out=tmp_path / "cut", resume=True)
    assert facts(resumed) == facts(whole)
    assert (resumed.trials[0].index, resumed.best_value) == (whole.trials[0].index, whole.best_value)
    assert resumed.best_recipe.recipe == whole.best_recipe.recipe
    assert left.facts["metrics"]["before"] == begun  # gone on with, not begun anew
    steps = [r["step"] for r in records(left) if "loss" in r]
    assert steps == [1, 2, 3, 4][: len(steps)]
    assert (tmp_path / "cut/best.yaml").read_text() == (tmp_path / "whole/best.yaml").read_text()
    pruned = next(t for t in whole.trials if t.status == "pruned")
    assert Run(tmp_path / "whole" / pruned.folder).facts["status"] == "pruned"
    assert [r["step"] for r in records(Run(tmp_path / "whole" / pruned.folder)) if "loss" in r] == [1, 2]


def test_the_command_line_from_a_recipe_to_the_best_recipe(quick, tmp_path, command):
    (tmp_path / "recipe.yaml").write_text(write_yaml(quick, {}))
    words = ["recipe.yaml", "--set", "train.steps=2", "--search", "grid", "--space", "train.learning_rate=1e-3,1e-2"]
    out, err = command(*words, "--out", "sw", "--json")
    told = json.loads(out)
    assert told["metric"] == "loss"
    values = {t["parameters"]["train.learning_rate"]: t["value"] for t in told["trials"]}
    assert set(values) == {1e-3, 1e-2}
    assert told["best"]["value"] == min(values.values())
    for trial in told["trials"]:
        run = Run(tmp_path / "sw" / trial["run"])
        assert run.metrics["after"]["loss"] == trial["value"]
        assert list(run.checkpoints.iterdir()) == []
        assert run.adapter.is_dir()
    assert "best first" in err
    assert "lora-ft train sw/best.yaml" in err
    best = load_recipe([tmp_path / "sw/best.yaml"]).recipe
    assert best.train.learning_rate == told["best"]["parameters"]["train.learning_rate"]
    assert (best.train.steps, best.out) == (2, None)
    with pytest.raises(UsageError, match="in use"):
        command(*words, "--out", "sw")
    with pytest.raises(UsageError, match="space was"):
        command("recipe.yaml", "--set", "train.steps=2", "--space", "method.r=2,4", "--resume", "--out", "sw")
    assert (
        json.loads(command("--resume", "--out", "sw", "--json")[0])["trials"] == told["trials"]
    )  # nothing is left to do


def test_a_stopped_sweep_saves_the_trial_and_says_how_to_go_on(quick, tmp_path, command):
    out = tmp_path / "sw"
    with pytest.raises(Interrupted) as caught:
        sweep(load_recipe([quick]), ["method.r=2,4"], out=out, listener=Stops("trial 1", 3))
    assert caught.value.exit_code == 75
    assert caught.value.what == "sweep stopped; 1 of 2 trials are done"
    assert caught.value.fix == f"lora-ft sweep --resume --out '{out}'"
    assert Run(out / "trials/0001").facts["status"] == "interrupted"
    told = json.loads(command("--resume", "--out", out, "--json")[0])
    assert [t["status"] for t in told["trials"]] == ["completed", "completed"]


def test_a_metric_that_does_not_exist_is_found_before_the_training(quick, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'token_accuracy'") as caught:
        sweep(load_recipe([quick]), ["method.r=2,4"], options=SweepOptions(metric="accuracy"), out=tmp_path / "sw")
    assert "loss" in caught.value.why
    assert not (tmp_path / "sw/trials/0000/metrics.jsonl").exists()


def test_stages_are_trained_in_each_trial_and_gone_on_with_after_a_stop(quick, tmp_path):
    quick |= {"stages": [{"name": "first"}, {"name": "second"}], "baseline": False}
    out = tmp_path / "sw"
    with pytest.raises(Interrupted):
        sweep(load_recipe([quick]), ["seed=0,1"], out=out, listener=Stops("trial 0", 2))
    result = sweep(out=out, resume=True)
    assert {t.status for t in result.trials} == {"completed"}
    for trial in result.trials:
        stages = [Run(out / trial.folder / "stages" / name) for name in ("1-first", "2-second")]
        assert trial.value == stages[1].metrics["after"]["loss"] < stages[0].metrics["after"]["loss"]
        assert not [p for s in stages for p in s.checkpoints.iterdir()]
    assert [s.name for s in load_recipe([out / "best.yaml"]).stages] == ["first", "second"]


def test_two_processes_share_the_trials(quick, tmp_path):
    quick["train"] |= {"steps": 2}
    options = SweepOptions("grid", workers=2)
    shared = sweep(load_recipe([quick]), ["method.r=2,4", "seed=0,1"], options=options, out=tmp_path / "shared")
    assert {t.status for t in shared.trials} == {"completed"}
    assert len({tuple(t.settings.items()) for t in shared.trials}) == 4
    assert json.loads((tmp_path / "shared/results.json").read_text())["best"] == shared.trials[0].index


def test_what_ends_a_worker_reaches_the_one_who_started_it(tmp_path):
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers/2.json").write_text(json.dumps({"what": "no rows", "where": "x", "why": "", "fix": "y"}))
    with pytest.raises(DataError, match="no rows") as caught:
        raise_first(tmp_path, [0, 3])
    assert (caught.value.where, caught.value.fix) == ("x", "y")
    with pytest.raises(ResourceError, match="worker 1 died: signal 9"):
        raise_first(tmp_path, [-9, 3])


def test_cross_validation_trains_each_fold_and_scores_by_the_mean(quick, tmp_path):
    quick["train"] |= {"steps": 2}
    result = sweep(load_recipe([quick]), options=SweepOptions(folds=3), out=tmp_path / "cv")
    (trial,) = result.trials
    runs = [Run(tmp_path / "cv" / trial.folder / f"fold-{i}") for i in (1, 2, 3)]
    losses = [run.metrics["after"]["loss"] for run in runs]
    assert trial.value == pytest.approx(statistics.fmean(losses))
    assert trial.deviation == pytest.approx(statistics.stdev(losses))
    assert len({run.facts["held_out_hash"] for run in runs}) == 3
    assert sum(run.facts["rows"] for run in runs) == 2 * 48  # each row is held out once
    assert result.best_recipe.recipe.data.eval == "25%"
