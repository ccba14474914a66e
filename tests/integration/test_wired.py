"""What a run writes down and tells when it begins, goes on, or is one of many."""

import lora_ft
from lora_ft.pipeline.start import BODY_FACT, body_fingerprint
from lora_ft.recipe import load_recipe
from lora_ft.search import SweepOptions
from tests.integration.test_start_from import Notes


def test_a_run_says_what_body_it_stands_on(run):
    assert run.facts[BODY_FACT] == body_fingerprint(lora_ft.load(run).model)


def test_a_run_that_goes_on_with_other_settings_says_so(recipe, tmp_path):
    recipe["train"] |= {"save_every": 2}
    lora_ft.train(recipe, out=tmp_path / "run")
    told = Notes()
    sets = ["train.learning_rate=0.001", "train.steps=8"]
    lora_ft.train(recipe, overrides=sets, out=tmp_path / "run", resume=True, listener=told)
    at = told.notes.index("2 settings differ from those the run was started with:")
    assert [line.split() for line in told.notes[at + 1 : at + 3]] == [
        ["train.steps", "6", "->", "8"], ["train.learning_rate", "0.005", "->", "0.001"],
    ]  # fmt: skip
    told = Notes()
    lora_ft.train(tmp_path / "run/recipe.resolved.yaml", out=tmp_path / "run", resume=True, listener=told)
    assert not any("differ" in n for n in told.notes)


def test_a_sweep_goes_on_after_a_first_value_that_does_not_fit_the_model(recipe, tmp_path):
    recipe["train"]["steps"] = 2
    recipe["eval"] = {"generate": 0}
    options = SweepOptions(search="grid")
    found = lora_ft.sweep(
        load_recipe([recipe]), ["method.target_modules=.*nowhere,.*q_proj"], options=options, out=tmp_path / "sweep"
    )
    assert sorted((r.index, r.status) for r in found.trials) == [(0, "failed"), (1, "completed")]
