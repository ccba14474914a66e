"""What people see is what is there: data cannot drive the terminal, a closed pipe does not stop a run."""

import io

import pytest
from rich.console import Console

from lora_ft.cli.train import _next
from lora_ft.recipe import load_recipe
from lora_ft.records import Plan
from lora_ft.report import before_after, flips, make_listener, merges, model_card, public_name
from lora_ft.report.display import LiveDisplay, PlainDisplay

PLAN = Plan(3, 1.0, 16, 40, 1234, 10, 1000, "plain loss")
STEP = {"step": 1, "loss": 1.5, "lr": 1e-4, "tokens_per_s": 123.4, "memory_bytes": 2**30}


def run_through(listener):
    listener.note("read [/red]\x1b[31mrows")
    listener.warn("[bold]careful")
    listener.start(PLAN)
    listener.step(STEP)
    listener.progress("judging", 1, 2)
    listener.progress("judging", 2, 2)
    listener.finish()


def test_a_pipe_gets_plain_lines_without_control_characters():
    out = io.StringIO()
    assert isinstance(make_listener(out), PlainDisplay)
    run_through(make_listener(out))
    lines = out.getvalue().splitlines()
    assert lines[0] == "read [/red]?[31mrows"
    assert lines[1] == "warning: [bold]careful"
    assert "3 steps of 16" in lines[2]
    assert "(1.00%)" in lines[2]
    assert lines[3] == "step 1/3  loss 1.5000  lr 1.00e-04  123 tok/s  1.00 GiB"
    assert lines[4] == "judging: 2/2"


def test_a_terminal_gets_bars_and_text_as_it_is():
    console = Console(file=io.StringIO(), force_terminal=True, width=160, highlight=False)
    run_through(LiveDisplay(console))
    text = console.file.getvalue()
    assert "read [/red]?[31mrows" in text
    assert "loss 1.5000" in text


def test_nobody_reading_does_not_stop_a_run():
    out = io.StringIO()
    listener = make_listener(out)
    out.close()
    with pytest.raises(ValueError, match="closed"):
        out.write("x")
    listener.note("still here")  # raises nothing


def test_tables_show_both_sides_and_escape_what_models_write():
    out = io.StringIO()
    before_after({"before": {"loss": 1.0}, "after": {"loss": 0.5, "exact_match": 1.0}}, out, "title")
    assert "1.0000" in out.getvalue()
    assert "-0.5000" in out.getvalue()
    flips([("rows.jsonl:17", "[red]want" + "w" * 99, "got\x07", "x" * 99)], out, "gained")
    assert "rows.jsonl:17" in out.getvalue()  # long answers must not push the place away
    assert "[red]want" in out.getvalue()
    assert "\x07" not in out.getvalue()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("builtin:a", "builtin:a"), ("org/name", "org/name"), ("/home/me/secret/model", "model"), ("./x/y", "y")],
)
def test_a_path_of_this_machine_is_not_published(name, shown):
    assert public_name(name) == shown


def test_the_card_names_a_hub_base_and_no_local_folder(tmp_path):
    def card(model):
        recipe = load_recipe([{"model": model, "data": {"train": f"{tmp_path}/rows.jsonl"}}]).recipe
        return model_card(recipe, {"metrics": {"before": {"loss": 1.0}}}, merged=False, figures={"kept": 0.5})

    assert "base_model: org/name" in card("org/name")
    text = card(f"{tmp_path}/base")
    assert "base_model:" not in text
    assert str(tmp_path) not in text
    assert "| loss | 1.0000 | - |" in text


@pytest.mark.parametrize(
    ("method", "can"), [("lora", True), ("loftq", True), ("a-plug-in", True), ("houlsby", False), ("p_tuning", False)]
)
def test_what_comes_next_is_a_merge_only_where_the_method_has_one(method, can, tmp_path):
    facts = {"tokens": 1, "train_s": 1.0, "tokens_per_s": 1.0, "wall_s": 1.0, "peak_memory_bytes": 1}
    (tmp_path / "run.json").write_text("{}")
    said = _next(tmp_path, {**facts, "data_wait_share": 0.0, "method": method})
    assert merges(method) == can == ("lora-ft merge" in said)
    assert can or "--format peft" in said
