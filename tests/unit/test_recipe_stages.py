"""Recipes with stages: what each stage's recipe is, and errors that name the line."""

import json

import pytest

from lora_ft.errors import UsageError
from lora_ft.recipe import Recipe, load_recipe, recipe_schema

TEXT = """\
model: base
method: {type: lora, r: 4}
data: {max_length: 64}
train:
  epochs: 3
  batch_size: 8
stages:
  - name: domain
    task: masked-lm
    data: {train: t.txt}
  - name: task
    adapter: new
    task: text-classification
    data:
      train: l.csv
    method: head
    train:
      steps: 3
"""


@pytest.fixture
def load(tmp_path):
    """Loads the text with one replacement, as a file, with --set values."""

    def call(old="", new="", sets=(), text=TEXT):
        assert old in text
        path = tmp_path / "r.yaml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return load_recipe([path], sets=sets)

    return call


def refused(load, *args, **named):
    with pytest.raises(UsageError) as caught:
        load(*args, **named)
    return caught.value


def test_a_stage_is_the_shared_keys_with_its_own_over_them(load):
    found = load()
    first, second = found.stages
    assert [(s.name, s.adapter) for s in found.stages] == [("domain", "same"), ("task", "new")]
    one, two = first.resolved.recipe, second.resolved.recipe
    assert (one.task.type, one.train.epochs, one.train.steps, one.data.train) == ("masked-lm", 3, None, "t.txt")
    assert (two.task.type, two.train.epochs, two.train.steps, two.data.train) == (
        "text-classification",
        None,
        3,
        "l.csv",
    )
    assert [s.resolved.recipe.data.max_length for s in found.stages] == [64, 64]
    assert [s.resolved.recipe.train.batch_size for s in found.stages] == [8, 8]
    assert (one.method.options(), two.method.type, two.method.options()) == ({"r": 4}, "head", {})
    assert found.recipe == two
    assert found.baseline


def test_every_value_knows_its_line(load, tmp_path):
    found = load(sets=["stages.1.train.steps=5"])
    path = tmp_path / "r.yaml"
    origins = found.stages[1].resolved.origins
    assert origins["data", "train"] == f"{path}:15"
    assert origins["model",] == f"{path}:1"
    assert origins["train", "batch_size"] == f"{path}:6"
    assert origins["train", "steps"] == "--set stages.1.train.steps"
    assert ("train", "epochs") not in origins
    assert found.stages[1].resolved.recipe.train.steps == 5
    text = found.text()
    lines = {line.split("#")[0].strip(): line.split("#")[-1].strip() for line in text.splitlines() if "#" in line}
    assert lines["train: t.txt"] == f"{path}:10"
    assert lines["steps: 5"] == "--set stages.1.train.steps"
    assert lines["adapter: new"] == f"{path}:12"


def test_the_resolved_recipe_gives_the_same_stages(load, tmp_path):
    found = load(sets=["baseline=false", "stages.0.seed=7"])
    (tmp_path / "again.yaml").write_text(found.text({("out",): ("there", "this run")}))
    again = load_recipe([tmp_path / "again.yaml"])
    assert [s.resolved.recipe for s in again.stages] == [
        s.resolved.recipe.model_copy(update={"out": "there"}) for s in found.stages
    ]
    assert {**again.values} == {**found.values, "out": "there"}
    assert (again.baseline, again.stages[0].resolved.recipe.seed) == (False, 7)


def test_stages_from_python_and_without_names():
    stages = [{"data": {"train": "a"}}, {"data": {"train": "b"}, "train": {"steps": 2}}]
    found = load_recipe([{"model": "m", "train": {"epochs": 1}, "stages": stages}, {"stages": [{}, {"seed": 3}]}])
    assert [s.name for s in found.stages] == ["stage1", "stage2"]
    assert [(s.resolved.recipe.train.epochs, s.resolved.recipe.train.steps) for s in found.stages] == [
        (1, None),
        (None, 2),
    ]
    assert [s.resolved.recipe.seed for s in found.stages] == [0, 3]
    later = load_recipe([{"model": "m", "stages": stages}], sets=["stages.1.train.epochs=4"])
    assert (later.recipe.train.epochs, later.recipe.train.steps) == (
        4,
        None,
    )  # of two that exclude each other, the later


@pytest.mark.parametrize(
    ("old", "new", "what", "line"),
    [
        ("      steps: 3", "      stps: 3", "unknown key 'stages.1.train.stps'; did you mean 'steps'?", 18),
        (
            "    train:\n      steps",
            "    trian:\n      steps",
            "unknown key 'stages.1.trian'; did you mean 'train'?",
            17,
        ),
        ("    adapter: new", "    adaptor: new", "unknown key 'stages.1.adaptor'; did you mean 'adapter'?", 12),
        ("    adapter: new", "    adapter: old", "stages.1.adapter: input should be 'same' or 'new', got 'old'", 12),
        ("name: task", "name: the task", "stages.1.name: string should match pattern", 11),
        ("batch_size: 8", "batch_size: -8", "train.batch_size: input should be greater than 0, got -8", 6),
        ("model: base", "model: base\nbaselin: no", "unknown key 'baselin'; did you mean 'baseline'?", 2),
        ("model: base", "model: base\nbaseline: 3", "baseline: input should be a valid boolean", 2),
        ("  - name: domain\n", "  - 5\n  - name: domain\n", "stages.0: a mapping of recipe keys, got 5", 8),
    ],
)
def test_a_mistake_is_named_with_its_line(load, tmp_path, old, new, what, line):
    error = refused(load, old, new)
    assert error.what.startswith(what)
    assert error.where == f"{tmp_path / 'r.yaml'}:{line}"
    assert error.exit_code == 2


def test_the_problems_of_all_stages_are_told_at_once(load):
    error = refused(load, text=TEXT.replace("t.txt}", "t.txt, evl: 1}").replace("steps: 3", "stps: 3"))
    assert error.what == "the recipe has 2 problems"
    assert "r.yaml:10: unknown key 'stages.0.data.evl'; did you mean 'eval'?" in error.where
    assert "r.yaml:18: unknown key 'stages.1.train.stps'" in error.where


def test_what_is_no_list_of_stages_is_refused(load, tmp_path):
    head = TEXT[: TEXT.index("stages:")]
    for written, got in (("[]", "0"), ("5", "5"), ("", "None"), ("some words", "'some words'"), ("[{name: a}]", "1")):
        error = refused(load, text=f"{head}stages: {written}\n")
        assert error.what == f"stages: a list of two or more recipes, got {got}"
        assert (error.where, "single stage" in error.fix) == (f"{tmp_path / 'r.yaml'}:7", True)
    assert "the name 'domain' is used twice" in refused(load, "name: task", "name: domain").what
    error = refused(load, text="model: base\ndata: {train: t}\nbaseline: no\n")
    assert error.what == "'baseline' goes with 'stages', and there are none"
    assert "did you mean 'stages'" in refused(load, text="model: base\ndata: {train: t}\nstagess: []\n").what


def test_a_setting_never_adds_a_stage(load):
    for key in ("stages.2.train.steps=5", "stages.task.train.steps=5"):
        error = refused(load, sets=[key])
        assert error.why == "there are: stages.0 (domain), stages.1 (task)"
    assert refused(load, text="model: m\ndata: {train: t}\n", sets=["stages.0.seed=1"]).why == "there are: none"


def test_a_section_of_the_wrong_kind_is_no_crash(load):
    assert refused(load, "train:\n  epochs: 3\n  batch_size: 8\n", "train: 5\n").what.startswith(
        "train: input should be"
    )
    assert refused(load, text="model: m\ndata: {train: t}\ntrain: 5\n").what.startswith("train: input should be")


def test_the_schema_knows_stages(cli_schema):
    stages = cli_schema["properties"]["stages"]
    assert (stages["type"], stages["minItems"]) == ("array", 2)
    inner = stages["items"]["properties"]
    assert set(inner) == {*Recipe.model_fields, "name", "adapter"}
    assert inner["adapter"]["enum"] == ["same", "new"]
    assert cli_schema["properties"]["baseline"]["type"] == "boolean"
    assert all(cli_schema["properties"][k]["description"] for k in ("stages", "baseline"))
    whole = {"required": ["model", "data"], "properties": {"data": {"required": ["train"]}}}
    assert cli_schema["anyOf"] == [{"required": ["stages"]}, whole]
    assert "required" not in cli_schema
    # A part of the data section in one stage, and the rest at the top, is valid: no section asks for all of its keys.
    assert "required" not in cli_schema["$defs"]["DataSection"]
    assert Recipe.model_json_schema()["$defs"]["DataSection"]["required"] == ["train"]


@pytest.fixture
def cli_schema(capsys):
    """What `lora-ft schema` prints."""
    from lora_ft.cli.listing import schema

    schema()
    found = json.loads(capsys.readouterr().out)
    assert found == recipe_schema()
    return found
