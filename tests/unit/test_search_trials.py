"""The books of a sweep with a made-up objective: no trial is lost, repeated or changed by a killed process."""

import csv
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora_ft.errors import DataError, DivergedError, Interrupted, UsageError
from lora_ft.recipe import load_recipe
from lora_ft.records import Silent
from lora_ft.search import Pruned, Score, SweepOptions, best_of, make_plan, open_study, ranked, work

ROOT = Path(__file__).parents[2]
RECIPE = {"model": "m", "data": {"train": "t.jsonl"}, "method": {"type": "lora", "r": 4}, "train": {"steps": 6}}
SPACE = ["train.learning_rate=1e-5..1e-2:log", "method.r=4,8,16", "train.batch_size=8..64:int"]
# A process that dies in the trial named, at the evaluation named.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_search_trials import bowl
from lora_ft.records import Silent
from lora_ft.search import SweepPlan, open_study, work

out, at, when = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

class Dies:
    def __init__(self, task): self.task = task
    def __getattr__(self, name): return getattr(self.task, name)
    def report(self, step, value, *, last=False):
        if self.task.index == at and step == when:
            os.kill(os.getpid(), signal.SIGKILL)
        self.task.report(step, value, last=last)

work(open_study(out, SweepPlan.read(out)), lambda task: bowl(Dies(task)), Silent())
"""


def bowl(task):
    """Lowest at a rate of 3e-4 and rank 8; seen on the way down at steps 10, 20 and 30."""
    rate, rank = float(task.settings["train.learning_rate"]), int(task.settings["method.r"])
    value = (
        (math.log10(rate) - math.log10(3e-4)) ** 2 + abs(rank - 8) / 8 + int(task.settings["train.batch_size"]) / 1e3
    )
    for step in (10, 20, 30):
        task.report(step, value + 1 / step, last=step == 30)
    return Score(value, {"loss": value, "accuracy": -value})


def start(out, space=SPACE, **options):
    plan = make_plan(load_recipe([RECIPE]), space, SweepOptions(**options))
    out.mkdir(exist_ok=True)
    plan.write(out)
    return open_study(out, plan)


def whole(out, **options):
    study = start(out, **options)
    work(study, bowl, Silent())
    return study


def facts(study):
    """All that must not depend on how often the process died."""
    return [(r.index, dict(r.settings), r.status, r.value) for r in study.rows()]


@pytest.mark.parametrize("search", ["random", "bayes"])
def test_a_killed_sweep_ends_with_the_same_trials_as_an_uninterrupted_one(tmp_path, search):
    wanted = whole(tmp_path / "whole", search=search, trials=12)
    assert {r.status for r in wanted.rows()} == {"completed", "pruned"}
    start(tmp_path / "cut", search=search, trials=12)
    for at, step in ((2, "20"), (7, "10")):
        words = [sys.executable, "-c", KILLED, str(tmp_path / "cut"), str(at), step]
        died = subprocess.run(words, cwd=ROOT, check=False)
        assert died.returncode == -9
    left = start(tmp_path / "cut", search=search, trials=12)
    assert [r.status for r in left.rows()][7:] == ["unfinished"]
    work(left, bowl, Silent())
    assert facts(left) == facts(wanted)
    assert best_of(left.rows(), True) is not None
    assert (tmp_path / "cut" / "best.yaml").read_text() == (tmp_path / "whole" / "best.yaml").read_text()


def test_a_trial_killed_just_after_it_was_found_hopeless_is_not_trained_to_its_end(tmp_path):
    study = start(tmp_path / "sweep", search="random", trials=12)

    def dies_when_pruned(task):
        try:
            return bowl(task)
        except Pruned:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        work(study, dies_when_pruned, Silent())
    index = len(study.rows()) - 1
    assert study.rows()[index].status == "unfinished"
    work(study, lambda task: bowl(task) if task.index != index else pytest.fail("trained again"), Silent())
    assert facts(study) == facts(whole(tmp_path / "whole", search="random", trials=12))


def test_a_line_that_a_killed_process_left_half_written_does_no_harm(tmp_path):
    wanted = facts(whole(tmp_path / "sweep", search="bayes", trials=8))
    with (tmp_path / "sweep" / "journal.log").open("a") as file:
        file.write('{"op_code": 4, "worker_i')
    study = start(tmp_path / "sweep", search="bayes", trials=9)
    work(study, bowl, Silent())
    again = start(tmp_path / "sweep", search="bayes", trials=9)
    assert facts(again)[:8] == wanted
    assert facts(again) == facts(whole(tmp_path / "whole", search="bayes", trials=9))


def test_proposals_follow_from_the_seed_and_bayes_learns(tmp_path):
    first = facts(whole(tmp_path / "a", search="bayes", trials=10, seed=1))
    assert facts(whole(tmp_path / "b", search="bayes", trials=10, seed=1)) == first
    assert facts(whole(tmp_path / "c", search="bayes", trials=10, seed=2)) != first
    random = facts(whole(tmp_path / "d", search="random", trials=10, seed=1))
    assert [r[1] for r in random[:5]] == [r[1] for r in first[:5]]  # both begin at random
    assert [r[1] for r in random[5:]] != [r[1] for r in first[5:]]
    rates = [float(r[1]["train.learning_rate"]) for r in random]
    assert len(set(rates)) == 10
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert all(8 <= int(r[1]["train.batch_size"]) <= 64 for r in random)


@pytest.mark.parametrize("search", ["grid", "bayes", "random"])
def test_workers_share_the_trials_and_repeat_none(tmp_path, search):
    space = ["method.r=4,8,16", "train.learning_rate=1e-4,1e-3", "train.batch_size=8,16"] if search == "grid" else SPACE
    plan = start(tmp_path / "sweep", space, search=search, trials=12).plan
    taken, both = [], threading.Barrier(2, timeout=20)

    def objective(task):
        taken.append(task.index)
        if task.index < 2:
            both.wait()  # the two are at work at the same time
        return bowl(task)

    workers = [
        threading.Thread(target=work, args=(open_study(tmp_path / "sweep", plan), objective, Silent()))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    rows = open_study(tmp_path / "sweep", plan).rows()
    assert sorted(taken) == list(range(12)) == [r.index for r in rows]
    assert {r.status for r in rows} <= {"completed", "pruned"}
    assert len({tuple(r.settings.items()) for r in rows}) == 12
    if search == "grid":
        assert {r.status for r in rows} == {"completed"}


def test_a_trial_at_work_elsewhere_is_left_alone_and_a_left_one_is_taken(tmp_path):
    one, two = (start(tmp_path / "sweep", search="random", trials=2) for _ in range(2))
    with one.claim() as mine:
        with two.claim() as theirs:
            assert (mine.index, theirs.index) == (0, 1)
        with two.claim() as left:
            assert (left.index, left.settings) == (1, theirs.settings)
            with one.claim() as none:
                assert none is None
    with two.claim() as left:
        assert (left.index, left.settings) == (0, mine.settings)


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(tmp_path):
    def objective(task):
        if task.index == 1:
            raise DivergedError("loss nan", where="step 3")
        if task.index == 2:
            raise UsageError("r must be at least 1")
        return Score(math.inf) if task.index == 3 else bowl(task)

    study = start(tmp_path / "sweep", search="random", trials=6)
    work(study, objective, Silent())
    rows = study.rows()
    assert [r.status for r in rows] == ["completed", "failed", "failed", "failed", "completed", "completed"]
    assert [r.error for r in rows[1:4]] == ["loss nan; step 3", "r must be at least 1", "loss is inf"]
    assert [r.index for r in ranked(rows, True)][3:] == [1, 2, 3]


def refuse(error):
    raise error


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("error", [UsageError("r does not go with it"), DataError("no row is left")])
def test_one_bad_value_fails_its_trial_wherever_it_stands(tmp_path, error, place):
    values = ["4", "8", "16"]
    values.insert(place, "32")
    study = start(tmp_path / "sweep", [f"method.r={','.join(values)}"], search="grid")

    def objective(task):
        rank = task.settings["method.r"]
        return Score(float(rank), {"loss": 1.0}) if rank != "32" else refuse(error)

    work(study, objective, Silent(), lambda: None)
    assert [r.status for r in study.rows()] == ["failed" if v == "32" else "completed" for v in values]
    assert study.rows()[place].error == error.what


def test_a_recipe_with_nothing_to_vary_stops_at_its_first_error(tmp_path):
    study = start(tmp_path / "sweep", [], folds=3)
    with pytest.raises(UsageError, match="no such method"):
        work(study, lambda task: refuse(UsageError("no such method")), Silent(), lambda: None)


@pytest.mark.parametrize("error", [UsageError("no such method"), DataError("no rows")])
def test_what_every_trial_would_fail_for_stops_the_sweep_at_once(tmp_path, error):
    study = start(tmp_path / "sweep", search="random", trials=6)
    with pytest.raises(type(error), match=error.what):
        work(study, lambda task: refuse(error), Silent(), lambda: refuse(error))
    assert [r.status for r in study.rows()] == ["unfinished"]
    work(study, bowl, Silent())  # the cause is mended: the same trial comes first
    assert facts(study) == facts(whole(tmp_path / "whole", search="random", trials=6))


def test_an_interrupted_trial_is_done_again_and_trials_may_grow(tmp_path):
    def objective(task):
        if task.index == 3:
            raise Interrupted("stopped")
        return bowl(task)

    study = start(tmp_path / "sweep", search="bayes", trials=6)
    with pytest.raises(Interrupted):
        work(study, objective, Silent())
    study = start(tmp_path / "sweep", search="bayes", trials=9)
    work(study, bowl, Silent())
    assert facts(study) == facts(whole(tmp_path / "whole", search="bayes", trials=9))


def test_pruning_compares_trials_whose_evaluations_lie_at_other_steps(tmp_path):
    """With another batch size an epoch has another number of steps."""
    ended = []

    def objective(task):
        bad = task.index == 5
        size = 7 if bad else 10
        for evaluation in (1, 2, 3):
            task.report(size * evaluation, 9.0 if bad else 1.0 + task.index / 10, last=evaluation == 3)
        ended.append(task.index)
        return Score(9.0 if bad else 1.0 + task.index / 10)

    study = start(tmp_path / "sweep", search="random", trials=7)
    work(study, objective, Silent())
    assert [r.status for r in study.rows()][:6] == ["completed"] * 5 + ["pruned"]
    assert 5 not in ended
    kept = start(tmp_path / "all", search="random", trials=7, prune=False)
    work(kept, objective, Silent())
    assert {r.status for r in kept.rows()} == {"completed"}


def test_values_that_were_trained_before_are_not_trained_again(tmp_path):
    trained = []

    def objective(task):
        trained.append(task.settings["method.r"])
        return Score(float(task.settings["method.r"]), {"loss": 1.0})

    study = start(tmp_path / "sweep", ["method.r=4,8"], search="random", trials=8)
    work(study, objective, Silent())
    assert sorted(trained) == ["4", "8"]
    again = [r for r in study.rows() if r.repeats is not None]
    assert len(again) == 6
    assert all(r.value == float(r.settings["method.r"]) for r in again)


def test_tables_and_the_best_recipe_are_written(tmp_path):
    study = whole(tmp_path / "sweep", search="random", trials=7, metric="accuracy")  # of accuracy more is better

    def largest(rows):
        return max((r for r in rows if r.status == "completed"), key=lambda r: r.value)

    best = largest(study.rows())
    found = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert (found["best"], found["trials"][0]["trial"], found["lower_is_better"]) == (best.index, best.index, False)
    assert found["trials"][0]["parameters"]["method.r"] == int(best.settings["method.r"])
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines()))
    assert len(rows) == 7
    assert float(rows[0]["train.learning_rate"]) == found["trials"][0]["parameters"]["train.learning_rate"]
    assert {"status", "accuracy", "loss", "seconds", "run", "error"} <= rows[0].keys()
    recipe = load_recipe([tmp_path / "sweep" / "best.yaml"]).recipe
    assert repr(recipe.train.learning_rate) == best.settings["train.learning_rate"]
    assert (recipe.method.options()["r"], recipe.out) == (int(best.settings["method.r"]), None)
    assert not [p for p in Path(tmp_path / "sweep").iterdir() if p.name.endswith(".tmp")]


def test_without_optuna_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    plan = make_plan(load_recipe([RECIPE]), SPACE, SweepOptions())
    with pytest.raises(UsageError, match="needs Optuna") as caught:
        open_study(tmp_path, plan)
    assert caught.value.fix == "pip install 'lora-ft[search]'"
