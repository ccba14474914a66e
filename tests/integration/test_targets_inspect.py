"""A target that cannot be reached is refused before training; `inspect` tells what is in a folder."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_ft
from lora_ft.errors import ArtifactError, UsageError


@pytest.mark.parametrize(
    ("target", "method", "said"),
    [
        ("vllm", "houlsby", "cannot go to vllm"),
        ("mlx", {"type": "lora", "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("llama.cpp", "prefix_tuning", "cannot go to llama.cpp.*gguf.*gguf-adapter"),
        ("vlm", "lora", "did you mean 'vllm'"),
    ],
)
def test_a_target_out_of_reach_is_refused_before_training(target, method, said, recipe, tmp_path):
    with pytest.raises(UsageError, match=said):
        lora_ft.train({**recipe, "method": method, "target": target}, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_template_that_ollama_cannot_say_is_found_before_training(recipe, base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'][::-1] }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    with pytest.raises(UsageError, match="cannot be written in Ollama's syntax"):
        lora_ft.train({**recipe, "model": str(tmp_path / "base"), "target": "ollama"}, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_target_within_reach_trains_and_is_reached(recipe, tmp_path):
    run = lora_ft.train({**recipe, "target": "vllm"}, out=tmp_path / "run")
    assert lora_ft.export(run, tmp_path / "served", format_name="vllm")["max_difference"] < 1e-4
    card = (tmp_path / "served" / "README.md").read_text()
    assert "format: vllm" in card
    held = {p.name for p in (tmp_path / "served").iterdir()}
    assert not held & {"probes.safetensors", "golden.safetensors", "probes.json"}


def test_inspect_tells_what_is_in_a_run_an_adapter_and_a_model(run, tmp_path, cli):
    found = lora_ft.inspect(run.path, base="")
    assert found["kind"] == "run"
    assert found["method"] == "lora"
    assert found["probes"] > 0
    assert max(found["norms"].values()) > 0
    assert found["golden_difference"] < 1e-4
    assert found["idle"] == []
    assert found["tensors"] == len(load_file(run.adapter / "adapter_model.safetensors"))
    lora_ft.export(run, tmp_path / "adapter", format_name="peft")
    assert lora_ft.inspect(tmp_path / "adapter")["kind"] == "adapter"
    lora_ft.merge(run, tmp_path / "merged")
    assert lora_ft.inspect(tmp_path / "merged")["kind"] == "model"
    code, out, _ = cli("inspect", run.path, "--check", "--json")
    assert code == 0
    assert json.loads(out)["golden_top1"] == 1.0
    assert cli("inspect", tmp_path)[0] == 4
    assert cli("inspect", tmp_path / "merged", "--check")[0] == 2  # not "all is well"
    shutil.copytree(run.adapter, tmp_path / "copied")
    assert cli("inspect", tmp_path / "copied", "--check")[0] == 2
    assert "golden_top1" in json.loads(cli("inspect", run.adapter, "--check", "--json")[1])


def test_inspect_names_an_adapter_that_does_nothing_and_one_that_is_nan(run, tmp_path, base_folder):
    lora_ft.export(run, tmp_path / "adapter", format_name="peft")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}, file)
    assert len(lora_ft.inspect(tmp_path / "adapter")["idle"]) == sum("lora_B" in k for k in tensors)
    with pytest.raises(ArtifactError, match="changes nothing"):
        lora_ft.inspect(tmp_path / "adapter", base=str(base_folder))
    save_file({k: torch.full_like(t, float("nan")) for k, t in tensors.items()}, file)
    with pytest.raises(ArtifactError, match="NaN"):
        lora_ft.inspect(tmp_path / "adapter")


def test_inspect_on_another_base_says_so(run, tmp_path, tokenizer):
    from tests.conftest import tiny_llama

    tiny_llama(len(tokenizer), seed=9).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="base model is not the one"):
        lora_ft.inspect(run.path, base=str(tmp_path / "other"))
    shutil.copytree(run.adapter, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="the base alone answers otherwise"):
        lora_ft.inspect(tmp_path / "adapter", base=str(tmp_path / "other"))


def test_inspect_on_a_base_of_other_shapes_names_tensors_and_both_shapes(run, tmp_path, tokenizer):
    from tests.conftest import tiny_llama

    tiny_llama(len(tokenizer), width=48).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    shutil.copytree(run.adapter, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"other shapes.*size mismatch for .*lora_A.*torch.Size.*torch.Size"):
        lora_ft.inspect(tmp_path / "adapter", base=str(tmp_path / "other"))


def test_the_right_base_in_another_folder_gives_the_same_answers(run, tmp_path, base_folder):
    shutil.copytree(base_folder, tmp_path / "same")
    assert lora_ft.inspect(run, base=str(tmp_path / "same"))["golden_difference"] < 1e-4


def test_unmerge_gives_the_base_and_refuses_another_model(run, tmp_path):
    lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    assert lora_ft.unmerge(tmp_path / "merged", run, tmp_path / "back")["weights_difference"] < 1e-5
    shutil.copytree(tmp_path / "merged", tmp_path / "wrong")
    file = tmp_path / "wrong" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "q_proj" in n)
    save_file({**tensors, name: tensors[name] * 0}, file)
    with pytest.raises(ArtifactError, match="differs from the base"):
        lora_ft.unmerge(tmp_path / "wrong", run, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_disk_that_is_full_or_too_small_is_said_and_nothing_stays(run, tmp_path, monkeypatch, cli):
    small = SimpleNamespace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: small)
        code, _, err = cli("merge", run.path, "--out", tmp_path / "small")
    assert (code, "are free" in err) == (6, True), err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_ft.exports.shards.write_behind", full)
    code, _, err = cli("merge", run.path, "--out", tmp_path / "full")
    assert (code, "No space left" in err) == (6, True), err
    assert list(tmp_path.iterdir()) == []
