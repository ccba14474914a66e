"""An adapter that starts from another run: what is taken over, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import lora_ft
from lora_ft.errors import ArtifactError
from lora_ft.pipeline import train_run
from lora_ft.pipeline.start import BODY_FACT, body_fingerprint
from lora_ft.records import Silent
from lora_ft.runs import Run
from lora_ft_adapters import add_adapter, build_config, state_of
from tests.integration.runs import adapter

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Notes(Silent):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def begun(monkeypatch):
    """The adapter's tensors just after it was started from another."""
    found, real = {}, train_run.start_from

    def spied(model, *rest):
        real(model, *rest)
        found.clear()
        found.update({k: v.clone() for k, v in state_of(model).items()})

    monkeypatch.setattr(train_run, "start_from", spied)
    return found


@pytest.fixture
def quick(recipe):
    return {**recipe, "train": {**recipe["train"], "steps": 2}, "eval": {"generate": 0}}


def test_an_adapter_goes_on_from_a_run_and_from_its_folder(run, quick, begun, tmp_path):
    before = adapter(run.adapter)
    for n, source in enumerate((run.path, run.adapter)):
        listener = Notes()
        after = lora_ft.train({**quick, "start_from": str(source)}, out=tmp_path / str(n), listener=listener)
        assert begun.keys() == before.keys()
        assert all(torch.equal(begun[k], v) for k, v in before.items())
        assert after.metrics["before"]["loss"] == pytest.approx(run.metrics["before"]["loss"])
        assert after.metrics["after"]["loss"] < run.metrics["after"]["loss"]
        assert "28 of 28 tensors" in " ".join(listener.notes)
        assert not listener.warnings
    assert f"start_from: {run.adapter}" in (tmp_path / "1/recipe.resolved.yaml").read_text()


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ({"type": "lora", "r": 8}, "that adapter has r: 4, this one 8"),
        ({"type": "lora", "r": 4, "lora_alpha": 99}, "that adapter has lora_alpha: [0-9]+, this one 99"),
        ({"type": "dora", "r": 4}, "that adapter has use_dora: None, this one True"),
        ({"type": "houlsby", "r": 4}, "that adapter is of type LORA, this one of type"),
        ({"type": "prompt_tuning", "num_virtual_tokens": 4}, "that adapter is of type LORA, this one of type PROMPT"),
        (
            {"type": "lora", "r": 4, "layers_to_transform": [1], "target_modules": [*LINEAR]},
            r"14 tensors .*layers\.0\.",
        ),
        ({"type": "lora", "r": 4, "target_modules": ["q_proj"]}, "24 tensors do not match; .* no place here"),
    ],
)
def test_another_method_rank_or_place_is_refused(run, quick, tmp_path, method, what):
    with pytest.raises(ArtifactError, match=what) as caught:
        lora_ft.train({**quick, "method": method, "start_from": str(run.path)}, out=tmp_path / "run")
    assert caught.value.fix == "use the same method section as that run"
    assert str(run.adapter) in str(caught.value)


def test_a_tensor_that_is_missing_inside_a_block_is_refused(run, quick, tmp_path):
    small = lora_ft.train(
        {**quick, "method": {"type": "lora", "r": 4, "target_modules": ["q_proj"]}}, out=tmp_path / "a"
    )
    with pytest.raises(ArtifactError, match=r"24 tensors do not match; .*\.k_proj\..* is not in that adapter"):
        lora_ft.train({**quick, "start_from": str(small.path)}, out=tmp_path / "b")


def test_other_new_tokens_are_refused(run, quick, tmp_path):
    quick["data"] = {**quick["data"], "add_tokens": ["<new>"]}
    with pytest.raises(ArtifactError, match="trainable_token_indices: None") as caught:
        lora_ft.train({**quick, "start_from": str(run.path)}, out=tmp_path / "a")
    assert "data.add_tokens" in caught.value.why
    first = lora_ft.train(quick, out=tmp_path / "b")
    listener = Notes()
    lora_ft.train({**quick, "start_from": str(first.path)}, out=tmp_path / "c", listener=listener)
    assert "29 of 29 tensors" in " ".join(listener.notes)


def test_another_base_is_warned_of_and_a_folder_without_adapter_refused(run, quick, tmp_path):
    shutil.copytree(quick["model"], tmp_path / "copy")
    listener = Notes()
    recipe = {**quick, "model": str(tmp_path / "copy"), "start_from": str(run.path)}
    lora_ft.train(recipe, out=tmp_path / "a", listener=listener)
    assert f"trained on {quick['model'].rsplit('/', 1)[-1]}, not on {tmp_path / 'copy'}" in listener.warnings[0]
    with pytest.raises(ArtifactError, match="the adapter cannot be read"):
        lora_ft.train({**quick, "start_from": str(tmp_path / "none")}, out=tmp_path / "b")


def otherwise(folder, target, changed):
    """A copy of a base with other values in one tensor."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[changed] = tensors[changed].flip(0)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("changed", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_an_adapter_of_other_weights_is_refused(run, quick, tmp_path, changed):
    run = on_its_body(run, tmp_path / "run")
    other = otherwise(quick["model"], tmp_path / "base", changed)
    for source in (run.path, run.adapter):
        with pytest.raises(ArtifactError, match="trained on another base: names, shapes or values") as caught:
            lora_ft.train({**quick, "model": other, "start_from": str(source)}, out=tmp_path / f"new-{source.name}")
        assert caught.value.exit_code == 4


def on_its_body(run, folder):
    """A copy of the run that says what body it stands on."""
    shutil.copytree(run.path, folder)
    Run(folder).update({BODY_FACT: body_fingerprint(lora_ft.load(run).model)})
    return Run(folder)


def test_one_body_has_one_fingerprint_whatever_head_method_and_dtype_it_has(base_folder):
    found = set()
    for kind, method, dtype in (
        (AutoModelForCausalLM, "lora", torch.float32), (AutoModelForSequenceClassification, "houlsby", torch.float32),
        (AutoModel, "full", torch.bfloat16), (AutoModel, "dora", torch.float32), (AutoModel, "ia3", torch.float32),
    ):  # fmt: skip
        model = kind.from_pretrained(base_folder, dtype=dtype).requires_grad_(False)
        found.add(body_fingerprint(add_adapter(model, build_config(method, {}, None, model))))
    (one,) = found
    assert one.startswith("float:")
    half = AutoModel.from_pretrained(base_folder, dtype=torch.float16).requires_grad_(False)
    assert body_fingerprint(add_adapter(half, build_config("lora", {}, None, half))).startswith("float16:")


def test_a_prompt_goes_on_and_a_prompt_network_is_refused(quick, begun, tmp_path):
    quick["method"] = {"type": "prompt_tuning", "num_virtual_tokens": 4}
    first = lora_ft.train(quick, out=tmp_path / "a")
    lora_ft.train({**quick, "start_from": str(first.path)}, out=tmp_path / "b")
    (name,) = begun
    assert torch.equal(begun[name], adapter(first.adapter)[name])
    quick["method"] = {"type": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 16}
    first = lora_ft.train(quick, out=tmp_path / "c")
    with pytest.raises(ArtifactError, match="was not taken over") as caught:
        lora_ft.train({**quick, "start_from": str(first.path)}, out=tmp_path / "d")
    assert "not the network" in caught.value.why


def test_a_head_of_the_same_shape_is_taken_over_with_the_body(tmp_path, begun):
    rows = [{"text": f"ball {i}", "label": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {
        "model": "builtin:tiny-bert", "task": "text-classification", "method": {"type": "pfeiffer", "r": 4},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 16},
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 1e-2, "dtype": "float32"},
    }  # fmt: skip
    first = lora_ft.train(recipe, out=tmp_path / "a")
    lora_ft.train({**recipe, "start_from": str(first.path)}, out=tmp_path / "b")
    assert all(torch.equal(begun[k], v) for k, v in adapter(first.adapter).items())
    assert any("classifier" in k for k in begun)
