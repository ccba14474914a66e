"""A recipe with a mistake is refused with the place and the fix; a right one means what it says."""

import pytest

from lora_ft.errors import UsageError
from lora_ft.recipe import load_recipe, preset_names
from lora_ft.recipe.yaml import parse_yaml

MINIMAL = {"model": "m", "data": {"train": "t.jsonl"}}


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_key(tmp_path):
    path = write(tmp_path, "model: m\ndata:\n  train: t\ntrain:\n  learning_rat: 1e-4\n")
    with pytest.raises(UsageError) as caught:
        load_recipe([path])
    assert "learning_rate" in caught.value.what
    assert caught.value.where == f"{path}:5"
    assert caught.value.exit_code == 2


def test_all_problems_of_a_recipe_are_told_at_once(tmp_path):
    path = write(tmp_path, "model: m\ndatta: 1\ntrain:\n  learning_rate: -1\n")
    with pytest.raises(UsageError) as caught:
        load_recipe([path])
    text = str(caught.value)
    assert "3 problems" in text
    assert f"{path}:2: unknown key 'datta'" in text
    assert f"{path}:4: train.learning_rate" in text
    assert "'data' is missing" in text


def test_1e_4_is_a_number_and_no_is_a_word():
    values, lines = parse_yaml("a: 1e-4\nb: no\nc:\n  d: 0x10\n  e: 1_000\n", "r")
    assert values == {"a": 1e-4, "b": "no", "c": {"d": 16, "e": 1000}}
    assert lines["c", "d"] == 4
    assert type(values["a"]) is float


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: !!python/object:os.system x\n", "tags are not allowed"),
        ("- 1\n", "mapping"),
        ("", "empty"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
         "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n", "expands"),
    ],
    ids=["duplicate", "syntax", "tag", "list", "empty", "bomb"],
)  # fmt: skip
def test_yaml_that_would_surprise_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse_yaml(text, "r.yaml")


def test_later_sources_win_and_say_where_each_value_came_from(tmp_path):
    path = write(tmp_path, "model: m\ndata:\n  train: t\ntrain:\n  batch_size: 4\n")
    resolved = load_recipe([path], sets=["train.batch_size=2", "train.learning_rate=1e-3"])
    assert resolved.recipe.train.batch_size == 2
    assert resolved.recipe.train.learning_rate == 1e-3
    text = resolved.text()
    assert f"train: t                                  # {path}:3" in text
    assert "# --set train.batch_size" in text
    assert "# default" in text


def test_the_resolved_recipe_is_a_recipe_that_means_the_same(tmp_path):
    first = load_recipe([MINIMAL], sets=["method.r=8", "train.early_stopping=2", "data.columns.prompt=q"])
    again = load_recipe([write(tmp_path, first.text())])
    assert again.recipe == first.recipe


def test_steps_from_a_later_source_replace_epochs_from_an_earlier_one():
    resolved = load_recipe([{**MINIMAL, "train": {"epochs": 3}}], sets=["train.steps=5"])
    assert (resolved.recipe.train.epochs, resolved.recipe.train.steps) == (None, 5)
    with pytest.raises(UsageError, match="not both"):
        load_recipe([{**MINIMAL, "train": {"epochs": 3, "steps": 5}}])


def test_a_null_takes_nothing_else_away():
    """`--set train.steps=1 --set train.epochs=null` trained for the default number of epochs."""
    resolved = load_recipe([{**MINIMAL, "train": {"epochs": 3}}], sets=["train.steps=5", "train.epochs=null"])
    assert (resolved.recipe.train.epochs, resolved.recipe.train.steps) == (None, 5)


def test_an_option_of_a_quantiser_keeps_its_type_and_another_type_drops_it():
    """`--set quant.OPTION` once put a mapping without a type in the place of `quant: nf4`."""
    option = "quant.bnb_4bit_use_double_quant=false"
    kept = load_recipe([{**MINIMAL, "quant": "nf4"}], sets=[option])
    assert (kept.recipe.quant.type, kept.recipe.quant.options()) == ("nf4", {"bnb_4bit_use_double_quant": False})
    assert kept.origins[("quant", "type")] == "python"
    given = {"type": "nf4", "bnb_4bit_use_double_quant": False}
    other = load_recipe([{**MINIMAL, "quant": given}], sets=["quant=torchao:int8_weight_only"])
    assert (other.recipe.quant.type, other.recipe.quant.options()) == ("torchao", {"config": "int8_weight_only"})
    assert other.origins[("quant", "config")] == "--set quant"


def test_an_option_set_before_its_type_is_not_dropped():
    base = {**MINIMAL, "method": {"type": "lora", "alpha": 8}}
    resolved = load_recipe([base], sets=["method.r=8", "method=dora"])
    assert (resolved.recipe.method.type, resolved.recipe.method.options()) == ("dora", {"r": 8})
    resolved = load_recipe([base], sets=["quant.llm_int8_threshold=4.0", "quant.type=int8"])
    assert resolved.recipe.quant.options() == {"llm_int8_threshold": 4.0}


def test_another_method_does_not_inherit_the_options_of_the_first():
    resolved = load_recipe([{**MINIMAL, "method": {"type": "lora", "r": 8}}], sets=["method.type=ia3"])
    assert resolved.recipe.method.options() == {}


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="'demo'"):
        load_recipe([], presets=["dem"])


@pytest.mark.parametrize("name", sorted(preset_names()))
def test_every_preset_is_described_and_is_a_recipe_once_it_has_data(name):
    assert len(preset_names()[name]) > 20
    load_recipe([], presets=[name], sets=["data.train=rows.jsonl"])


@pytest.mark.parametrize("setting", ["nothing", "=1", "a..b=1"])
def test_a_malformed_set_is_refused(setting):
    with pytest.raises(UsageError, match="--set"):
        load_recipe([MINIMAL], sets=[setting])


@pytest.mark.parametrize("setting", ["train.early_stopping=2", "train.eval_every=5",
                                     "train.lr_scheduler_type=reduce_lr_on_plateau"])  # fmt: skip
def test_a_setting_that_needs_held_out_rows_is_refused_without_them(setting):
    with pytest.raises(UsageError, match="needs held-out rows"):
        load_recipe([MINIMAL], sets=[setting, "data.eval=null"])
