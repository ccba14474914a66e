"""What every entry of every axis must keep, third-party ones included."""

import importlib.util
import json
import re

import pytest
import torch

import lora_ft
from lora_ft.data import load_examples
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.registry import EXPORTS, FORMATS, QUANTIZERS, TASKS, Registry
from tests.conftest import tiny_llama
from tests.tiny_artifacts import artifact_of

# A row of each format. A new format without a row here fails, so that it cannot go untested.
ROWS = {
    "alpaca": {"instruction": "q", "output": "a"},
    "arrays": {"inputs": [[1.5, 2.0]], "target": 1},
    "labelled_text": {"text": "q", "label": "a"},
    "multiple_choice": {"question": "q", "choices": ["a", "b"], "label": 1},
    "numeric_table": {"x1": 1.5, "x2": 2, "target": 1},
    "pairs": {"anchor": "q", "positive": "a"},
    "source_target": {"source": "q", "target": "a"},
    "squad": {"question": "q", "context": "c a", "answers": {"text": ["a"], "answer_start": [2]}},
    "token_tags": {"tokens": ["q", "a"], "tags": ["O", "B-X"]},
    "translation": {"translation": {"en": "q", "de": "a"}},
    "openai_messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "text": {"text": "q a"},
    "audio_text": {"audio": "a.wav", "text": "hello"},
    "boxes": {"image": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": ["cat"]}},
    "coco": {
        "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
    },
    "image_caption": {"image": "a.png", "caption": "a cat"},
    "image_mask": {"image": "a.png", "mask": "b.png"},
    "image_question": {"image": "a.png", "question": "what is it?", "answer": "a cat"},
    "labelled_audio": {"audio": "a.wav", "label": "cat"},
    "labelled_image": {"image": "a.png", "label": "cat"},
    "llava": {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image> what is it?"},
            {"from": "gpt", "value": "a cat"},
        ],
    },
    "vision_messages": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": "a cat"},
        ],
    },
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
    # A chat with images is a chat too; which of the two it is, the task says.
    kinds = ("image_conversation",) if name == "vision_messages" else None
    (example,), detected = load_examples(str(path), "auto", {}, kinds=kinds)
    assert detected == name
    assert example.fields
    assert example.where == f"{path}:1"
    with pytest.raises((ValueError, KeyError, TypeError)):
        FORMATS.get(name).to_examples({}, True)


@pytest.mark.parametrize("name", QUANTIZERS.discover())
def test_a_quantised_base_still_learns_after_it_was_evaluated(name, recipe, tmp_path):
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs, and their gradient is lost."""
    if name == "torchao":
        pytest.importorskip("torchao")
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
    assert caught.value.fix.startswith("pip install 'lora-ft[quant]'")


@pytest.mark.parametrize("name", EXPORTS.discover())
def test_an_artifact_that_differs_is_not_published(name, tokenizer, tmp_path):
    from lora_ft.artifact import Probe
    from lora_ft.exports import probe, publish

    export = EXPORTS.get(name)
    if "bitsandbytes" in export.targets:
        pytest.skip("needs a quantised base: tests/integration/test_quantised_merge.py")
    config = tiny_llama(len(tokenizer)).config
    dtype = "float32" if "float32" in export.dtypes else ""
    artifact, model = artifact_of(config, tmp_path / "adapter", tokenizer, dtype=dtype)
    probes = probe(model, [{"input_ids": [[5, 6, 7, 8]]}], artifact.outputs)
    export.check(artifact.subject)
    wrong = [Probe(p.inputs, p.base, p.adapted + torch.linspace(0, 3, p.adapted.shape[-1])) for p in probes]
    with pytest.raises(ArtifactError):
        publish(artifact, tmp_path / "bad", export, wrong, lambda folder, figures: None)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    publish(artifact, tmp_path / "good", export, probes, lambda folder, figures: None)
    assert (tmp_path / "good").is_dir()


@pytest.mark.parametrize("name", EXPORTS.discover())
def test_a_format_says_what_it_can_be_written_in(name):
    export = EXPORTS.get(name)
    assert export.default_dtype("float32") in (*export.dtypes, "")
    assert export.default_dtype("bfloat16") in (*export.dtypes, "")
    assert export.targets
