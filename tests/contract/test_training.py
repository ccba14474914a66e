"""Every method through the whole pipeline: what a dry run counts is trained, judged, saved and loaded again."""

import pytest

import lora_ft
from lora_ft.pipeline import dry_run
from lora_ft.recipe import load_recipe
from lora_ft_adapters import list_methods
from scripts.survey_methods import ON_QUANTISED, OPTIONS

TRAINED = [n for n, m in list_methods().items() if not m.refusal and n not in ON_QUANTISED]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", TRAINED)
def test_a_method_trains_judges_saves_and_loads(recipe, tmp_path, name):
    recipe["method"] = {"type": name, **OPTIONS.get(name, {})}
    recipe["train"]["steps"] = 4
    recipe["eval"] = {"generate": 0}
    planned = dry_run(load_recipe([recipe], [], []))["trainable_parameters"]
    run = lora_ft.train(recipe, out=tmp_path / "run")
    close = 0.1 if name == "eva" else 0  # it shares the ranks out by what it finds
    assert planned is None or planned == pytest.approx(run.facts["trainable_parameters"], rel=close)
    assert run.metrics["after"]["loss"] != run.metrics["before"]["loss"]
    judged = lora_ft.evaluate_run(run)[0]
    assert judged["before"]["loss"] == pytest.approx(run.metrics["before"]["loss"], rel=1e-5)
    assert judged["after"]["loss"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-4)
