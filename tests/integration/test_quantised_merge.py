"""A 4-bit file of a merge-aware run answers as the run did; of a plain run the choice of base is judged and told."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_ft
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.models.opening import BaseSpec

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "cache"))


def trained(recipe, tmp_path, quant, **train):
    recipe = {**recipe, "quant": quant}
    recipe["train"] = recipe["train"] | {"steps": 12, "learning_rate": 1e-2, **train}
    return lora_ft.train(recipe, out=tmp_path / "run")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_file_of_a_merge_aware_run_is_what_was_trained(kind, recipe, tmp_path):
    run = trained(recipe, tmp_path, {"type": kind, "merge_aware": True})
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"] - 0.2
    assert lora_ft.evaluate_run(run)[0]["after"]["loss"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-3)
    figures = lora_ft.export(run, tmp_path / "small", format_name="quantised")
    assert figures["update_kept"] > 0.95
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map={"": "cpu"})
    kinds = {type(p).__name__ for p in model.parameters()}
    assert kinds & {"Params4bit", "Int8Params"}


def test_a_base_that_was_not_quantised_has_no_such_file(recipe, tmp_path):
    run = trained(recipe, tmp_path, "none", steps=2)
    with pytest.raises(UsageError, match="quantises"):
        lora_ft.export(run, tmp_path / "small", format_name="quantised")
    with pytest.raises(UsageError, match="was not quantised"):
        lora_ft.merge(run, tmp_path / "m", into="dequantised")


def test_both_bases_are_judged_and_the_better_one_is_merged_into(recipe, tmp_path):
    run = trained(recipe, tmp_path, "nf4")
    figures = lora_ft.merge(run, tmp_path / "auto", dtype="float32")
    losses = {k: figures[f"loss_{k}"] for k in ("original", "dequantised")}
    assert figures["into"] == min(losses, key=losses.get)
    assert losses["original"] != losses["dequantised"]
    for name, loss in losses.items():
        alone = lora_ft.merge(run, tmp_path / name, dtype="float32", into=name)
        assert alone["max_difference"] < 1e-4
        assert loss == pytest.approx(run.metrics["after"]["loss"], rel=0.2)
        assert lora_ft.unmerge(tmp_path / name, run, tmp_path / f"{name} back")["weights_difference"] < 1e-5
    # On the dequantised weights the merged model is what was trained.
    assert losses["dequantised"] == pytest.approx(run.metrics["after"]["loss"], rel=0.02)


def test_an_update_that_rounding_takes_away_is_an_error(recipe, tmp_path):
    run = trained(recipe, tmp_path, "none", steps=1, learning_rate=1e-5)
    with pytest.raises(ArtifactError, match=r"left in bfloat16|survives in bfloat16"):
        lora_ft.merge(run, tmp_path / "m", dtype="bfloat16")
    assert not (tmp_path / "m").exists()
    assert lora_ft.merge(run, tmp_path / "m", dtype="float32")["weights_kept"] > 0.9


def test_a_quantised_base_whose_files_changed_is_not_merged_into(recipe, tmp_path):
    shutil.copytree(recipe["model"], tmp_path / "base")
    run = trained({**recipe, "model": str(tmp_path / "base")}, tmp_path, "nf4", steps=3)
    assert lora_ft.merge(run, tmp_path / "good", into="original")["max_difference"] < 1e-4
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "up_proj" in n)
    save_file(tensors | {name: tensors[name] * 1.5}, file, metadata={"format": "pt"})
    for into in ("original", "dequantised", "auto"):
        with pytest.raises(ArtifactError, match="not the one this adapter was trained on"):
            lora_ft.merge(run, tmp_path / "bad", into=into)
    assert not (tmp_path / "bad").exists()


def test_the_bases_own_settings_for_writing_are_in_the_merged_model(recipe, tmp_path):
    shutil.copytree(recipe["model"], tmp_path / "base")
    own = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.05, "eos_token_id": [2, 40]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    run = trained({**recipe, "model": str(tmp_path / "base")}, tmp_path, "none", steps=2)
    lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (found["temperature"], found["repetition_penalty"]) == (0.7, 1.05)
    assert {2, 40} < set(found["eos_token_id"])  # and the one that ends the template's turns


def test_a_merged_whisper_still_takes_a_language(tmp_path):
    from lora_ft.models.resolve import resolve

    base = Path(resolve("builtin:tiny-whisper", print))
    wanted = json.loads((base / "generation_config.json").read_text())
    spec = BaseSpec(str(base), "AutoModelForSpeechSeq2Seq")
    assert spec.skeleton().generation_config.lang_to_id == wanted["lang_to_id"]


def test_a_method_that_needs_the_whole_base_goes_into_the_original_weights(recipe, tmp_path):
    recipe = {**recipe, "method": {"type": "adalora"}}
    run = trained(recipe, tmp_path, "nf4")
    figures = lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    assert figures["into"] == "original"
    assert figures["update_kept"] > 0.99
    with pytest.raises(ArtifactError, match="cannot be merged into"):
        lora_ft.merge(run, tmp_path / "no", into="dequantised")
