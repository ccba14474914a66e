"""Every kind of method through the whole pipeline: no changed base, no other result on resume, nothing lost."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import lora_ft
from lora_ft.errors import UsageError
from lora_ft.pipeline import dry_run
from lora_ft.training import loop
from tests.conftest import tiny_llama


def _train(recipe, out, **method):
    return lora_ft.train({**recipe, "method": method}, out=out)


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "loraga", "eva", "lorafa", "loraplus", "adalora", "dora"])
def test_a_lora_variant_learns_merges_and_loads_on_the_original_base(recipe, tmp_path, name):
    recipe["train"]["steps"] = 8
    run = _train(recipe, tmp_path / "run", type=name)
    before, after = run.metrics["before"], run.metrics["after"]
    assert after["loss"] < before["loss"]
    figures = lora_ft.merge(run, tmp_path / "merged")  # reads back from disk and compares
    assert figures["max_difference"] < 1e-3
    again = lora_ft.evaluate_run(run)[0]
    assert again["before"]["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert again["after"]["loss"] == pytest.approx(after["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning", "houlsby", "loreft", "bitfit", "head"])
def test_a_method_without_weight_deltas_learns_and_predicts(recipe, rows_file, tmp_path, name):
    extra = {"add_bias": True} if name == "bitfit" else {}
    run = _train(recipe, tmp_path / "run", type=name, **extra)
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    assert lora_ft.predict(run, str(rows_file), tmp_path / "out.jsonl", max_new_tokens=4) == 48
    lora_ft.export(run, tmp_path / "peft", format_name="peft")


@pytest.mark.parametrize("name", ["adalora", "pissa", "p_tuning", "lorafa", "layers"])
def test_a_resumed_run_of_a_method_with_state_ends_bit_for_bit_the_same(recipe, tmp_path, monkeypatch, name):
    recipe["train"].update(steps=8, save_every=1)
    whole = _train(recipe, tmp_path / "whole", type=name)
    real = loop._Loop._step

    def stops(self):
        real(self)
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_step", stops)
        with pytest.raises(lora_ft.errors.Interrupted):
            _train(recipe, tmp_path / "cut", type=name)
    cut = lora_ft.train({**recipe, "method": {"type": name}}, out=tmp_path / "cut", resume=True)
    a, b = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["lora", "lorafa", "shadow", "eva", "pissa", "corda", "shira", "prefix_tuning"])
def test_a_dry_run_counts_what_training_will_train(recipe, tmp_path, name):
    from lora_ft.recipe import load_recipe

    recipe["method"] = {"type": name}
    planned = dry_run(load_recipe([recipe], [], []))
    run = lora_ft.train(recipe, out=tmp_path / "run")
    if name == "shira":  # it chooses entries of the weights themselves
        assert planned["trainable_parameters"] is None
    else:  # EVA shares the ranks out by what it finds
        close = 0.1 if name == "eva" else 0
        assert planned["trainable_parameters"] == pytest.approx(run.facts["trainable_parameters"], rel=close)


def test_repeated_layers_train_load_and_merge(recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    run = _train(recipe, tmp_path / "run", type="lora", r=4, layer_replication=[[0, 2], [1, 2]])
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    lora_ft.merge(run, tmp_path / "merged")
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").model.layers) == 3


def test_adalora_spends_its_budget_where_it_was_told(recipe, tmp_path):
    recipe["train"].update(steps=12)
    run = _train(recipe, tmp_path / "run", type="adalora", init_r=4, target_r=2)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    kept = sum(sum(v) for v in config["rank_pattern"].values())
    assert kept == 2 * 14  # 7 linear layers in each of 2 blocks
    held = sum(v.shape[0] for k, v in load_file(run.adapter / "adapter_model.safetensors").items() if "lora_A" in k)
    assert held == kept


def test_what_cannot_be_taken_out_again_says_so(recipe, tmp_path):
    run = _train(recipe, tmp_path / "run", type="adalora")
    lora_ft.merge(run, tmp_path / "merged")
    with pytest.raises(UsageError, match="cannot be taken out"):
        lora_ft.unmerge(tmp_path / "merged", run, tmp_path / "back")


def test_new_tokens_are_trained_saved_and_there_again_after_loading_and_merging(recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe["data"]["add_tokens"] = ["<tool>", "<result>"]
    run = lora_ft.train(recipe, out=tmp_path / "run")
    loaded = lora_ft.load(run)
    ids = loaded.processor.convert_tokens_to_ids(["<tool>", "<result>"])
    rows = len(loaded.processor)
    assert loaded.model.get_input_embeddings().weight.shape[0] == rows == max(ids) + 1
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert any("trainable_tokens" in k and v.shape[0] == 2 for k, v in saved.items())
    assert not any(v.shape[0] == rows for v in saved.values())  # rows only, never the whole embedding
    lora_ft.merge(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == rows
    assert merged.get_input_embeddings().weight.data_ptr() == merged.get_output_embeddings().weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<result>") == ids[1]
    batch = torch.tensor([[5, *ids, 7]])
    assert torch.allclose(merged(batch).logits, loaded.model(batch).logits, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_can_be_told_apart_when_they_are_written(tmp_path, tokenizer, recipe, tied):
    """A head of its own that did not learn them would give all new tokens the same chance."""
    base = tmp_path / "base"
    model = tiny_llama(len(tokenizer))
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    pairs = [("red", "<tool>"), ("blue", "<result>")] * 16
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    data = {"train": str(rows), "eval": str(rows), "add_tokens": ["<tool>", "<result>"]}
    recipe |= {"model": str(base), "data": data}
    recipe["train"] |= {"steps": 8, "learning_rate": 2e-2}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    loaded = lora_ft.load(run)
    first, second = loaded.processor.convert_tokens_to_ids(["<tool>", "<result>"])
    logits = loaded.model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert abs(float(logits[first] - logits[second])) > 1e-3
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    lora_ft.export(run, tmp_path / "peft", format_name="peft")
    assert "resize_token_embeddings" in (tmp_path / "peft" / "README.md").read_text()
    lora_ft.merge(run, tmp_path / "merged")


def test_a_token_that_is_known_already_does_not_cut_words_apart(recipe, tmp_path, tokenizer):
    recipe["data"]["add_tokens"] = ["a", "<|im_end|>"]
    run = lora_ft.train(recipe, out=tmp_path / "run")
    loaded = lora_ft.load(run)
    assert len(loaded.processor) == len(tokenizer)
    assert loaded.processor("banana a")["input_ids"] == tokenizer("banana a")["input_ids"]


@pytest.mark.parametrize(
    ("method", "extra", "said"),
    [
        ({"type": "adalora", "init_r": 2, "target_r": 4}, {}, "target_r 4"),
        ({"type": "lora", "bias": "all"}, {}, "changes the base itself"),
        ({"type": "loftq"}, {}, "quant is none"),
        ({"type": "eva"}, {"add_tokens": ["<x>"]}, "new tokens"),
        ({"type": "lora"}, {"add_tokens": [" "]}, "add_tokens"),
        ({"type": "prompt_tuning", "num_virtual_tokens": 0}, {}, "nothing is trainable"),
    ],
)
def test_a_mistake_is_an_error_of_the_users_and_no_traceback(recipe, tmp_path, method, extra, said):
    recipe["data"] |= extra
    with pytest.raises(UsageError, match=said):
        _train(recipe, tmp_path / "run", **method)


def test_new_tokens_with_a_method_that_cannot_train_rows_are_refused(recipe, tmp_path):
    recipe["data"]["add_tokens"] = ["<tool>"]
    with pytest.raises(UsageError, match="cannot train embedding rows"):
        _train(recipe, tmp_path / "run", type="ia3")


def test_gradual_unfreezing_starts_at_the_top_and_reaches_everything(recipe, tmp_path):
    recipe["train"].update(steps=3, unfreeze_every=2, layer_lr_decay=0.5, save_every=1)
    run = lora_ft.train(recipe, out=tmp_path / "run")
    early = load_file(run.checkpoints / "step-00000002" / "adapter_model.safetensors")
    late = load_file(run.adapter / "adapter_model.safetensors")
    moved = {block: any(bool(v.any()) for k, v in held.items() if f"layers.{block}." in k and "lora_B" in k)
             for held, block in ((early, 0), (early, 1))}  # fmt: skip
    assert moved == {0: False, 1: True}
    assert all(bool(v.any()) for k, v in late.items() if "lora_B" in k)


@pytest.mark.parametrize("name", ["hra", "psoft"])
def test_a_method_that_peft_cannot_run_on_four_bits_is_refused_in_words(recipe, tmp_path, name):
    with pytest.raises(UsageError, match=r"does not run on this base|does not fit"):
        lora_ft.train({**recipe, "quant": "nf4", "method": {"type": name}}, out=tmp_path / "run")


def test_loftq_starts_nearer_to_the_unquantised_base_and_is_merged_into_the_quantised_one_alone(recipe, tmp_path):
    plain = lora_ft.train({**recipe, "quant": "nf4"}, out=tmp_path / "plain")
    run = lora_ft.train({**recipe, "quant": "nf4", "method": {"type": "loftq", "r": 8}}, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < plain.metrics["before"]["loss"]
    for name in ("gguf-adapter", "mlx", "vllm"):  # their programs bring the original weights
        with pytest.raises(UsageError, match="error of its quantised base"):
            lora_ft.export(run, tmp_path / name, format_name=name)
    with pytest.raises(UsageError, match="error of its quantised base"):
        lora_ft.merge(run, tmp_path / "merged", into="original")
    for name in ("peft", "gguf", "ollama-adapter", "quantised"):
        lora_ft.export(run, tmp_path / name, format_name=name)
    figures = lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    assert figures["into"] == "dequantised"
    assert figures["max_difference"] < 1e-4


def test_a_rate_for_a_parameter_that_does_not_exist_is_refused(recipe, tmp_path):
    recipe["train"]["lr_multipliers"] = {"*lora_C*": 2.0}
    with pytest.raises(UsageError, match="matches no parameter"):
        lora_ft.train(recipe, out=tmp_path / "run")


def test_a_module_that_the_files_lack_is_found_trained_and_saved_with_the_adapter(base_folder, tmp_path):
    from lora_ft.models.load import load_with_new_head
    from lora_ft_adapters import add_adapter, build_config, load_adapter, save_adapter, trainable, unsaved

    def classifier(seed):
        torch.manual_seed(seed)
        return load_with_new_head(
            str(base_folder), "AutoModelForSequenceClassification", dtype=torch.float32, device=torch.device("cpu"),
            model_arguments={"num_labels": 3, "pad_token_id": 0},
        )  # fmt: skip

    base = classifier(0)
    assert base.fresh == ("score",)
    options = {"r": 2, "modules_to_save": list(base.fresh)}
    model = add_adapter(base.model, build_config("lora", options, "SEQ_CLS", base.model))
    assert any("score" in n for n, _ in trainable(model))
    assert unsaved(model) == []
    with torch.no_grad():
        for _, p in trainable(model):
            p.add_(0.05)
    batch = torch.arange(3, 12)[None]
    want = model.eval()(batch).logits
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(classifier(7).model, tmp_path / "adapter", "other")  # its own head starts elsewhere
    assert torch.allclose(again(batch).logits, want, atol=1e-6)


def test_a_file_that_lacks_part_of_a_module_is_no_new_head():
    from lora_ft.models.load import fresh_modules

    model = tiny_llama(50)
    assert fresh_modules(model, ["lm_head.weight"]) == ("lm_head",)
    assert fresh_modules(model, ["model.layers.0.self_attn.q_proj.weight"]) == ()
    assert fresh_modules(model, ["model.layers.0.nothing"]) == ()
