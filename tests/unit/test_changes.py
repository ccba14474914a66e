"""A resumed run says what it does otherwise; it never goes on with other settings in silence."""

import pytest

from lora_ft.pipeline.changes import changes
from lora_ft.recipe import load_recipe
from lora_ft.runs import Run

RECIPE = {"model": "m", "data": {"train": "t.jsonl"}, "train": {"steps": 6}, "out": "here"}


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path)
    (tmp_path / "recipe.resolved.yaml").write_text(load_recipe([RECIPE]).text())
    found.update({"versions": {"torch": "2.10.0", "peft": "0.21"}})
    return found


def test_every_value_and_version_that_differs_is_a_line_of_the_table(run):
    sets = ["train.learning_rate=0.001", "train.steps=null", "train.epochs=2", "method.r=4", "out=elsewhere"]
    table = changes(run, load_recipe([RECIPE], sets=sets).text(), {"torch": "2.13.0", "peft": "0.21"})
    assert {tuple(line.split("  ", 1)[0].split()) for line in table} == {
        ("method.r",), ("train.epochs",), ("train.steps",), ("train.learning_rate",), ("version", "of", "torch"),
    }  # fmt: skip
    told = {line.split("  ")[0].strip(): line.split("  ")[-1].strip() for line in table}
    assert told["train.learning_rate"] == "0.0002 -> 0.001"
    assert told["train.steps"] == "6 -> none"
    assert told["method.r"] == "none -> 4"
    assert told["version of torch"] == "2.10.0 -> 2.13.0"
    assert len({line.index("->") - len(line.split("  ")[-1].split(" ->")[0].strip()) for line in table}) == 1  # aligned


def test_the_same_recipe_has_no_changes(run):
    assert changes(run, load_recipe([RECIPE]).text(), run.facts["versions"]) == []
