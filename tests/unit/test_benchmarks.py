"""The benchmark of methods: its two tasks on tiny models, and results that can be put together in parts."""

import json

import pytest
from transformers import BertConfig, BertModel

from benchmarks import methods
from lora_ft_adapters import list_methods


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer):
    """A tiny encoder without a head, with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=len(tokenizer),
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_method_that_is_measured_exists():
    for rates in methods.RATES.values():
        assert set(rates) <= set(list_methods())


@pytest.mark.parametrize("name", ["lora", "houlsby"])
def test_an_encoder_with_a_new_head_learns_to_tell_texts_apart(encoder, name):
    before = []
    for long, short in (("odd", "even"), ("even", "odd")):  # what starts right by chance starts wrong the other way
        rows = [("aaaa" if i % 2 else "zz", long if i % 2 else short) for i in range(32)]
        figures = methods.classify(name, 12, encoder, rows, rows[:8])
        before.append(figures["accuracy before"])
        assert figures["accuracy after"] == 1.0
        assert figures["trainable parameters"] > 2 * 32 + 2  # more than the head
    assert sum(before) == 1.0


def test_the_demo_is_run_with_another_method(recipe):
    smaller = {"model": recipe["model"], "data": {**recipe["data"], "max_length": 256}, "train": {"dtype": "float32"}}
    figures = methods.demo("houlsby", 3, smaller)
    assert figures["loss after"] < figures["loss before"]
    assert not set(methods.row(1, "houlsby", figures).values()) & {"-"}


def test_the_task_has_a_message_and_an_intent():
    rows = methods.messages("builtin:support-heldout")
    assert len(rows) == 120
    assert len({intent for _, intent in rows}) == 6


def test_results_of_parts_are_put_together_in_the_tables_order(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks._side_by_side.RESULTS", tmp_path)
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    good = {"trainable parameters": 7, "accuracy before": 0.2, "accuracy after": 0.9, "seconds": 1.0}
    methods.save(2, {"dora": good, "lora": good})
    methods.save(2, {"dora": {"error": "ValueError: no"}})
    methods.save(1, {"lora": {"dtype": "bfloat16"}})
    held = json.loads((tmp_path / "methods.json").read_text())
    lora, dora = held["tables"][methods.TITLES[2]]
    assert (lora["method"], lora["accuracy after"], lora["error"]) == ("lora", 0.9, "")
    assert (dora["method"], dora["accuracy after"], dora["error"]) == ("dora", "-", "ValueError: no")
    assert list(lora) == list(dora)  # the page takes its columns from the first row
    assert "the base in bfloat16" in held["about"]
    assert held["commits"][methods.TITLES[2]].keys() == {"lora", "dora"}


def test_a_method_that_fails_is_a_row_that_says_why(monkeypatch):
    class Done:
        returncode, stdout = 1, ""
        stderr = "Traceback:\n  File x\nlora_ft.errors.UsageError: error[E-USAGE]: no | such\n  why it is so\n"

    monkeypatch.setattr(methods.subprocess, "run", lambda *a, **k: Done())
    assert methods.apart(2, "lora", 1) == {"error": "lora_ft.errors.UsageError: error[E-USAGE]: no / such"}
