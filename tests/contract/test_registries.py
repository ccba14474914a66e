"""What every entry of every axis must keep, third-party ones included."""

import importlib.util
import json
import re

import pytest
import torch

import lora_ft
from lora_ft.data import load_examples
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import EXPORTS, FORMATS, QUANTIZERS, TASKS, Registry
from lora_ft_adapters import add_adapter, build_config, trainable
from lora_ft_adapters.fast.verify import verify
from tests.conftest import tiny_llama

# A row of each format. A new format without a row here fails, so that it cannot go untested.
ROWS = {
    "alpaca": {"instruction": "q", "output": "a"},
    "openai_messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "text": {"text": "q a"},
}


@pytest.mark.parametrize("registry", [FORMATS, TASKS, QUANTIZERS, EXPORTS], ids=lambda r: r.axis)
def test_entries_are_found_named_and_described(registry):
    entries = registry.discover()
    assert entries
    for name, entry in entries.items():
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", name)
        assert 10 < len(entry.description) < 200
    with pytest.raises(UsageError, match="unknown"):
        registry.get("no-such-thing")


def test_a_name_registered_twice_or_badly_raises():
    class Entry:
        description = "An entry."

        def __init__(self, name):
            self.name = name

    registry = Registry("things", "lora_ft.data.formats")
    registry.register(Entry("one"))
    with pytest.raises(ValueError, match="twice"):
        registry.register(Entry("one"))
    with pytest.raises(ValueError, match="not a valid name"):
        registry.register(Entry("Two Words"))


@pytest.mark.parametrize("name", FORMATS.discover())
def test_a_format_claims_its_own_rows_and_only_it_wins(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    (example,), detected = load_examples(str(path), "auto", {})
    assert detected == name
    assert example.fields
    assert example.where == f"{path}:1"
    with pytest.raises((ValueError, KeyError, TypeError)):
        FORMATS.get(name).to_example({}, True)


@pytest.mark.parametrize("name", TASKS.discover())
def test_a_task_encodes_collates_and_its_fast_loss_equals_the_plain_one(name, tokenizer):
    task = TASKS.get(name)
    encode = task.encoder(tokenizer, EncodeOptions())
    samples = [s for n in (1, 5, 3) for s in encode(Example({"prompt": "q" * n, "completion": "a" * n}, "r")).samples]
    assert all(s.labelled and s.length and s.where == "r" for s in samples)
    assert "[[aaaaa" in task.show(samples[1], tokenizer)
    model = add_adapter(tiny_llama(len(tokenizer)), build_config("lora", {"r": 2}, task.peft_task_type)).train()
    batch = task.collate(samples, tokenizer)
    verdict = verify(
        lambda: task.fast_loss(model, batch).total, lambda: task.loss(model, batch).total,
        [p for _, p in trainable(model)], torch.float32,
    )  # fmt: skip
    assert verdict.exact, verdict.reason
    assert task.loss(model, batch).count == sum(s.labelled for s in samples)
    # The sum over a batch is the sum over its samples.
    parts = sum(float(task.loss(model, task.collate([s], tokenizer)).total.detach()) for s in samples)
    assert parts == pytest.approx(float(task.loss(model, batch).total.detach()), rel=1e-5)


@pytest.mark.parametrize("name", TASKS.discover())
def test_a_task_answers_in_the_order_asked(name, tokenizer):
    task = TASKS.get(name)
    model = tiny_llama(len(tokenizer))
    examples = [Example({"prompt": "x" * n, "completion": "y"}, f"row {n}") for n in (9, 2, 5, 1)]
    options = PredictOptions(4, 2, EncodeOptions())
    predictions = list(task.predict(model, tokenizer, examples, options))
    assert [p.where for p in predictions] == ["row 9", "row 2", "row 5", "row 1"]
    assert all(p.reference == "y" for p in predictions)
    assert len(task.judge(predictions).right) == 4
    assert task.reference_lengths(tokenizer, examples) == [2, 2, 2, 2]


@pytest.mark.parametrize("name", QUANTIZERS.discover())
def test_a_quantised_base_still_learns_after_it_was_evaluated(name, recipe, tmp_path):
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs, and their gradient is lost."""
    recipe["quant"] = name
    recipe["train"] |= {"steps": 12, "learning_rate": 1e-2, "dtype": "auto"}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"] - 0.3
    assert lora_ft.export(run, tmp_path / "adapter", format_name="peft")["max_difference"] <= 1e-2
    assert lora_ft.merge(run, tmp_path / "merged")["max_difference"] <= 1e-4


@pytest.mark.parametrize("name", [n for n in QUANTIZERS.discover() if n != "none"])
def test_a_quantizer_without_its_package_names_the_line_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError) as caught:
        QUANTIZERS.get(name).load_arguments(torch.float32)
    assert caught.value.fix == "pip install 'lora-ft[quant]'"


@pytest.mark.parametrize("name", EXPORTS.discover())
def test_an_artifact_that_differs_is_not_published(name, tokenizer, tmp_path):
    from lora_ft.exports import probe, publish
    from lora_ft.records import Artifact, Probe

    def base():
        return tiny_llama(len(tokenizer))

    torch.manual_seed(3)
    model = add_adapter(base(), build_config("lora", {"r": 2, "init_lora_weights": False}, "CAUSAL_LM")).eval()
    probes = probe(model, [{"input_ids": [5, 6, 7, 8]}])
    artifact = Artifact(
        model=model, processor=tokenizer, base="tiny", auto_class="AutoModelForCausalLM", stored_dtype="float32",
        generation={"eos_token_id": [3]}, load_base=base,
    )  # fmt: skip
    wrong = [Probe(p.inputs, p.base, p.adapted + 1.0) for p in probes]
    with pytest.raises(ArtifactError, match="differs"):
        publish(artifact, tmp_path / "bad", EXPORTS.get(name), wrong, lambda folder, figures: None)
    assert list(tmp_path.iterdir()) == []
