"""Training, merging and loading stop, with their exit code and nothing lost, when something is wrong."""

import json

import pytest

import lora_ft
from lora_ft.errors import ArtifactError, DataError, DivergedError, UsageError
from lora_ft.records import Silent
from tests.integration.runs import adapter, forget_proofs


def test_a_folder_in_use_is_not_merged_into(run, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UsageError, match="in use"):
        lora_ft.merge(run, tmp_path)


def test_an_adapter_that_is_nan_or_does_nothing_is_not_exported(run, tmp_path):
    import shutil

    from safetensors.torch import save_file

    for value in (float("nan"), 0.0):
        copy = tmp_path / f"run{value}"
        shutil.copytree(run.path, copy)
        tensors = {k: t.fill_(value) if "lora_B" in k else t for k, t in adapter(copy / "adapter").items()}
        save_file(tensors, copy / "adapter" / "adapter_model.safetensors")
        with pytest.raises(ArtifactError, match="is not the file that training wrote"):
            lora_ft.merge(copy, tmp_path / "merged")
        forget_proofs(lora_ft.Run(copy))
        with pytest.raises(ArtifactError, match=r"NaN|changes nothing"):
            lora_ft.merge(copy, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_an_adapter_on_another_base_of_the_same_shapes_is_refused(run, tmp_path, tokenizer):
    import shutil

    from tests.conftest import tiny_llama

    other = tmp_path / "other"
    tiny_llama(len(tokenizer), seed=9).save_pretrained(other)
    tokenizer.save_pretrained(other)
    shutil.copytree(run.path, tmp_path / "run")
    path = tmp_path / "run" / "recipe.resolved.yaml"
    text = path.read_text()
    old = next(line for line in text.splitlines() if line.startswith("model:"))
    path.write_text(text.replace(old, f"model: {other}"))
    with pytest.raises(ArtifactError, match="not the one this adapter was trained on"):
        lora_ft.load(tmp_path / "run")


def test_divergence_stops_before_the_weights_are_touched(recipe, tmp_path):
    recipe["train"] |= {"optimizer": "sgd", "learning_rate": 9, "max_grad_norm": None, "steps": 60, "warmup_ratio": 0}
    recipe["method"] |= {"lora_alpha": 1e6}
    recipe["data"]["eval"] = None
    with pytest.raises(DivergedError, match="diverged at step"):
        lora_ft.train(recipe, out=tmp_path / "run")
    assert lora_ft.Run(tmp_path / "run").facts["status"] == "diverged"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"method": {"type": "lora", "target_modules": ["q_projj"]}}, UsageError, "nearest: q_proj x2"),
        ({"method": {"type": "lora", "rr": 3}}, UsageError, "no option 'rr'"),
        ({"task": "causal-lmm"}, UsageError, "'causal-lm'"),
        ({"quant": "nf5"}, UsageError, "'nf4'"),
        ({"data": {"train": "missing.jsonl"}}, DataError, "not found"),
        ({"data": {"max_length": 4}}, DataError, "no row is left"),
        ({"data": {"overlong": "error", "max_length": 40}}, DataError, "longer than max_length 40"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_stops_before_the_weights_are_read(recipe, tmp_path, monkeypatch, change, error, said):
    monkeypatch.setattr(
        "lora_ft.models.opening.load_with_new_head", lambda *a, **k: pytest.fail("the weights were read")
    )
    for key, value in change.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
    with pytest.raises(error, match=said):
        lora_ft.train(recipe, out=tmp_path / "run")


def test_held_out_rows_that_are_trained_on_are_told(recipe, tmp_path):
    warned = []

    class Hear(Silent):
        def warn(self, text):
            warned.append(text)

    recipe["data"]["eval"] = recipe["data"]["train"]
    recipe["train"]["steps"] = 1
    lora_ft.train(recipe, out=tmp_path / "run", listener=Hear())
    assert any("48 training rows have the input of 48 held-out rows" in w for w in warned)


def test_a_launcher_with_several_processes_is_refused_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes"):
        lora_ft.train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resume_with_another_recipe_is_refused_and_leaves_the_run_as_it_was(run, recipe, tmp_path):
    import shutil

    shutil.copytree(run.path, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    for change in ({"method": {"type": "lora", "r": 8}}, {"data": {**recipe["data"], "train": "gone.jsonl"}}):
        with pytest.raises((ArtifactError, DataError)):
            lora_ft.train({**recipe, **change}, out=tmp_path / "run", resume=True)
        after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
        assert {k: v for k, v in after.items() if k in before} == before


def test_held_out_rows_without_an_answer_do_not_stop_the_run(recipe, tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": talk}, {"messages": [*talk, {"role": "user", "content": "and?"}]}]
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe["data"]["eval"] = str(path)
    recipe["train"]["steps"] = 1
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert len((run.path / "answers-after.jsonl").read_text().splitlines()) == 1
    metrics, _, pairs = lora_ft.evaluate_run(run)
    assert "exact_match" in metrics["after"]
    assert len(pairs) == 1


def test_sharegpt_under_another_column_name_can_be_evaluated_after_training(recipe, tmp_path):
    rows = [{"chat": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]} for i in range(12)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe["data"] = {"train": str(path), "eval": "25%"}
    recipe["train"]["steps"] = 1
    for name in ("auto", "sharegpt"):
        recipe["data"]["format"] = name
        run = lora_ft.train(recipe, out=tmp_path / name)
        assert run.facts["format"] == "sharegpt"
        assert lora_ft.evaluate_run(run)[0]["after"]["loss"] == pytest.approx(run.metrics["after"]["loss"])


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"type": "lora", "r": -1}, "does not fit this model"),
        ({"type": "dora", "use_dora": False}, "is use_dora=True"),
        ({"type": "loftq"}, "quant is none"),
        ({"type": "eva", "r": 400}, "tokens in every calibration batch"),
        ({"type": "pissa", "r": 400}, "is more than"),
        ({"type": "cpt"}, "cannot be trained here"),
        ({"type": "adalora", "tinit": 4, "tfinal": 4}, "leave no step"),
        ({"type": "lora", "target_modules": ["q_proj", "layers:5-9"]}, "blocks 0 to 1"),
    ],
)
def test_a_method_that_would_train_something_else_is_refused(recipe, tmp_path, method, said):
    with pytest.raises(UsageError, match=said):
        lora_ft.train({**recipe, "method": method}, out=tmp_path / "run")


def test_a_corrupt_adapter_file_is_no_internal_error(run, tmp_path):
    import shutil

    shutil.copytree(run.path, tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="is not the file that training wrote"):
        lora_ft.load(tmp_path / "run")
    forget_proofs(lora_ft.Run(tmp_path / "run"))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        lora_ft.load(tmp_path / "run")
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(ArtifactError, match="pickle"):
        lora_ft.load(tmp_path / "run")


def test_a_merge_dtype_that_does_not_exist_is_refused_before_anything_loads(run, tmp_path):
    with pytest.raises(UsageError, match="fp16"):
        lora_ft.merge(run, tmp_path / "m", dtype="fp16")
    with pytest.raises(UsageError, match="does not go with peft"):
        lora_ft.export(run, tmp_path / "m", format_name="peft", dtype="float32")
    figures = lora_ft.merge(run, tmp_path / "m", dtype="bfloat16")
    assert figures["update_kept"] > 0.5


def test_after_a_mistake_the_same_folder_can_be_used_once_it_is_mended(recipe, tmp_path):
    wrong = {**recipe, "data": {**recipe["data"], "max_length": 4}}
    with pytest.raises(DataError):
        lora_ft.train(wrong, out=tmp_path / "run")
    assert lora_ft.Run(tmp_path / "run").facts["status"] == "failed"
    recipe["train"]["steps"] = 1
    facts = lora_ft.train(recipe, out=tmp_path / "run").facts
    assert (facts["status"], facts["error"]) == ("completed", None)
    with pytest.raises(UsageError, match="in use"):
        lora_ft.train(recipe, out=tmp_path / "run")
