"""Every mistake in a search space is found before anything runs."""

import json

import pytest

from lora_ft.errors import ArtifactError, UsageError
from lora_ft.recipe import load_recipe
from lora_ft.search import SweepOptions, SweepPlan, combinations, make_plan, parse_space, resume_plan, with_settings
from lora_ft.search.space import Choices, Range, values_of

RECIPE = {"model": "m", "data": {"train": "t.jsonl"}, "method": {"type": "lora", "r": 4}, "train": {"steps": 6}}


def base(**more):
    return load_recipe([{**RECIPE, **more}])


def test_values_are_read_as_set_reads_them():
    (axis,) = parse_space(["method.target_modules=all-linear,[q_proj, v_proj],'a,b',null,1e-4,true"])
    assert axis.texts == ("all-linear", "[q_proj, v_proj]", "'a,b'", "null", "1e-4", "true")
    assert [values_of({"k": t})["k"] for t in axis.texts] == [
        "all-linear",
        ["q_proj", "v_proj"],
        "a,b",
        None,
        1e-4,
        True,
    ]


def test_ranges_and_points():
    assert parse_space(["a.b=1e-5..1e-3:log"]) == (Range("a.b", 1e-5, 1e-3, True, False),)
    assert parse_space(["a=8..64:int"]) == (Range("a", 8, 64, False, True),)
    assert parse_space(["a=-1.5..2.0"]) == (Range("a", -1.5, 2.0, False, False),)
    assert parse_space(["a=1e-5..1e-3:log:3"]) == (Choices("a", ("1e-05", "0.0001", "0.001")),)
    assert parse_space(["a=1..4:int:4"]) == (Choices("a", ("1", "2", "3", "4")),)
    assert parse_space(["a=1..3:int:9"]) == (Choices("a", ("1", "2", "3")),)
    assert parse_space(["a=../x.jsonl,../y.jsonl"]) == (Choices("a", ("../x.jsonl", "../y.jsonl")),)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (["train.learning_rate"], "takes a.b=values"),
        (["=1,2"], "takes a.b=values"),
        (["a="], "empty value"),
        (["a=1,,2"], "empty value"),
        (["a=1,1"], "value twice"),
        (["a=0.1,1e-1"], "value twice"),
        (["a=1,2", "a=3"], "'a' twice"),
        (["a=2.0..1.0"], "from low to high"),
        (["a=1.0..1.0"], "from low to high"),
        (["a=0.0..1.0:log"], "begins above 0"),
        (["a=1..8"], "whole numbers only, or any"),
        (["a=1.5..8:int"], "ends of an :int range"),
        (["a=1.0..8.0:lgo"], "did you mean 'log'"),
        (["a=1.0..8.0:3:4"], "more than one number"),
        (["a=1.0..8.0:1"], "at least 2"),
        (["a=1..x"], "both ends of a range are numbers"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(space, message):
    with pytest.raises(UsageError, match=message):
        parse_space(space)


@pytest.mark.parametrize(
    ("space", "message", "where"),
    [
        ("train.lerning_rate=1e-4,1e-3", "did you mean 'learning_rate'", "train.lerning_rate"),
        ("train.learning_rate=1e-4,20", "learning_rate", "value 20"),
        ("train.learning_rate=1e-4..20.0", "learning_rate", "value 20.0"),
        ("train.batch_size=8.0..64.0", "batch_size", "value 29.392"),
        ("train.optimizer=adamw,adam_w", "optimizer", "value adam_w"),
        ("tasks=a,b", "unknown key", "--space tasks"),
    ],
)
def test_a_key_or_value_that_does_not_fit_the_recipe_is_named(space, message, where):
    with pytest.raises(UsageError, match=message) as caught:
        make_plan(base(), [space], SweepOptions())
    assert where in caught.value.where


def test_grid_has_every_combination_once_and_refuses_what_it_cannot_cover():
    axes = parse_space(["method.r=4,8", "train.learning_rate=1e-4,1e-3,1e-2"])
    found = combinations(axes)
    assert len({tuple(c.items()) for c in found}) == len(found) == 6
    assert make_plan(base(), ["method.r=4,8", "seed=1,2,3"], SweepOptions("grid")).trials == 6
    with pytest.raises(UsageError, match="all 6 combinations, not 5"):
        make_plan(base(), ["method.r=4,8", "seed=1,2,3"], SweepOptions("grid", 5))
    with pytest.raises(UsageError, match="needs lists") as caught:
        make_plan(base(), ["train.learning_rate=1e-4..1e-3:log"], SweepOptions("grid"))
    assert ":5" in caught.value.fix
    with pytest.raises(UsageError, match="every combination to its end"):
        make_plan(base(), ["method.r=4,8"], SweepOptions("grid", prune=True))


def test_what_makes_no_sweep_is_refused():
    for options, space, message in (
        (SweepOptions(), [], "nothing to search"),
        (SweepOptions("byes"), ["seed=1,2"], "did you mean 'bayes'"),
        (SweepOptions(trials=0), ["seed=1,2"], "--trials is at least 1"),
        (SweepOptions(workers=0), ["seed=1,2"], "--workers is at least 1"),
        (SweepOptions(seed=-1), ["seed=1,2"], "--seed is at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            make_plan(base(), space, options)
    with pytest.raises(UsageError, match=r"data\.eval is null"):
        make_plan(base(data={"train": "t", "eval": None}), ["seed=1,2"], SweepOptions())
    assert make_plan(base(data={"train": "t", "eval": None}), [], SweepOptions(folds=3)).trials == 1


def test_settings_lie_over_the_recipe_as_set_would():
    # A value of the method's type clears the options of another type, so it is set before them.
    axes = parse_space(["method.r=16", "train.epochs=2", "method.type=adalora"])
    new = with_settings(base(), combinations(axes)[0]).recipe
    assert (new.method.type, new.method.options()) == ("adalora", {"r": 16})
    assert (new.train.steps, new.train.epochs) == (None, 2)  # the later of two that exclude each other
    assert with_settings(base(), {}).recipe == base().recipe


def test_a_recipe_with_stages_is_varied_as_a_whole(tmp_path):
    stages = [{"name": "first", "train": {"steps": 3}}, {"name": "second", "data": {"train": "u.jsonl"}}]
    staged = base(stages=stages, out="elsewhere")
    plan = make_plan(staged, ["train.learning_rate=1e-4,1e-3", "stages.1.method.r=2,8"], SweepOptions("random"))
    plan.write(tmp_path)
    kept = SweepPlan.read(tmp_path)
    new = with_settings(kept.base, {"train.learning_rate": "1e-3", "stages.1.method.r": "8"})
    recipes = [s.resolved.recipe for s in new.stages]
    assert [s.name for s in new.stages] == ["first", "second"]
    assert [r.train.learning_rate for r in recipes] == [1e-3, 1e-3]
    assert [r.method.options()["r"] for r in recipes] == [4, 8]
    assert [(r.train.steps, r.data.train, r.out) for r in recipes] == [(3, "t.jsonl", None), (6, "u.jsonl", None)]
    assert not plan.prune  # evaluations of one stage say nothing about those of another
    for options in (SweepOptions(folds=3), SweepOptions("random", prune=True)):
        with pytest.raises(UsageError, match="does not go with a recipe that has stages"):
            make_plan(staged, ["train.learning_rate=1e-4,1e-3"], options)


def test_a_plan_is_read_back_as_it_was_and_a_difference_is_named(tmp_path):
    space = ["method.r=4,8", "train.learning_rate=1e-4..1e-3:log"]
    kept = make_plan(base(), space, SweepOptions("random", 9, seed=3))
    kept.write(tmp_path)
    assert SweepPlan.read(tmp_path) == kept
    assert SweepPlan.read(tmp_path).base.recipe == base().recipe
    assert resume_plan(kept, None, [], SweepOptions()) == kept
    assert resume_plan(kept, base(), space, SweepOptions("random", 12, seed=3)).trials == 12
    for resolved, given, options, named in (
        (base(train={"steps": 7}), space, SweepOptions(), r"recipe.train.steps was 6, now 7"),
        (base(), space[:1], SweepOptions(), "space was"),
        (base(), space, SweepOptions("bayes"), "search was 'random', now 'bayes'"),
        (None, [], SweepOptions(metric="f1"), "metric was 'loss', now 'f1'"),
        (None, [], SweepOptions(seed=4), "seed was 3, now 4"),
        (None, [], SweepOptions(folds=3), "folds was 1, now 3"),
        (None, [], SweepOptions(prune=False), "prune was True, now False"),
    ):
        with pytest.raises(UsageError, match=named):
            resume_plan(kept, resolved, given, options)
    with pytest.raises(UsageError, match="not shrink"):
        resume_plan(kept, None, [], SweepOptions(trials=8))


def test_a_folder_without_a_whole_plan_cannot_be_resumed(tmp_path):
    with pytest.raises(ArtifactError, match="no sweep to resume"):
        SweepPlan.read(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(ArtifactError, match="no sweep to resume"):
        SweepPlan.read(tmp_path)
