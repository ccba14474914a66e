"""The whole path on a tiny model: the same numbers as plain PEFT, and artifacts that are what they say."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_ft
from lora_ft.data import load_examples
from lora_ft.errors import Interrupted, UsageError
from lora_ft.pipeline import dry_run
from lora_ft.pipeline import train as pipeline_train
from lora_ft.recipe import load_recipe
from lora_ft.records import EncodeOptions, Silent
from lora_ft.tasks.causal_lm import CausalLM
from lora_ft.training import loop
from lora_ft.training.batching import step_samples
from lora_ft.training.schedule import rate_factor
from tests.integration.runs import adapter, records


def test_losses_and_adapter_equal_a_plain_peft_loop(recipe, tmp_path):
    """40 lines of PEFT and PyTorch: padded batch, the model's own loss, AdamW, cosine with warm-up, clipping."""
    recipe["data"]["eval"] = None
    ours = lora_ft.train(recipe, out=tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    examples, _ = load_examples(recipe["data"]["train"], "auto", {})
    encode = CausalLM().encoder(tokenizer, EncodeOptions(max_length=128))
    samples = [s for e in examples for s in encode(e).samples]
    base = AutoModelForCausalLM.from_pretrained(recipe["model"])
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(6):
        chosen = [samples[i] for i in step_samples(step, len(samples), 8, seed=0)]
        width = max(s.length for s in chosen)
        rows = [(list(s.inputs["input_ids"]), list(s.inputs["labels"])) for s in chosen]
        batch = {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        }
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * rate_factor("cosine", step, 6, 1)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().item())
    assert [r["loss"] for r in records(ours)] == pytest.approx(losses, abs=1e-5)
    model.save_pretrained(str(tmp_path / "plain"))
    wanted, got = adapter(tmp_path / "plain"), adapter(ours.adapter)
    assert set(got) == set(wanted)
    assert max(float((got[k] - wanted[k]).abs().max()) for k in got) < 1e-5


def test_micro_batches_of_any_size_give_the_same_run(recipe, tmp_path):
    results = []
    for budget in (1, 64, 100_000):
        recipe["train"]["tokens_per_micro_batch"] = budget
        run = lora_ft.train(recipe, out=tmp_path / str(budget))
        results.append([r["loss"] for r in records(run) if "loss" in r])
    assert results[0] == pytest.approx(results[2], abs=1e-6)
    assert results[1] == pytest.approx(results[2], abs=1e-6)


def test_a_run_keeps_what_it_did(run):
    facts = run.facts
    assert facts["status"] == "completed"
    assert set(run.metrics) == {"before", "after"}
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    assert {"loss", "token_accuracy", "exact_match", "field_f1"} <= set(run.metrics["after"])
    assert "equal to the plain one" in facts["fast_path"]
    steps = [r for r in records(run) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert sum(1 for r in records(run) if "eval_loss" in r) == 2  # after the epoch of 5 steps, and at the end
    assert (run.path / "recipe.resolved.yaml").read_text().count("# ") > 20
    card = (run.adapter / "README.md").read_text()
    assert "exact_match" in card
    assert str(run.path.parent) not in card + (run.adapter / "adapter_config.json").read_text()
    assert len((run.path / "answers-after.jsonl").read_text().splitlines()) == 4


def test_stock_peft_loads_the_adapter_without_any_difference(run, recipe):
    loaded = lora_ft.load(run)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe["model"]), str(run.adapter)).eval()
    ids = torch.arange(40)[None]
    assert torch.equal(stock(ids).logits, loaded.model(ids).logits)
    with loaded.model.disable_adapter():
        assert not torch.equal(stock(ids).logits, loaded.model(ids).logits)


def test_the_merged_model_equals_adapter_on_base_and_needs_no_peft(run, tmp_path):
    figures = lora_ft.merge(str(run.path), str(tmp_path / "merged"))
    assert figures["max_difference"] <= 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded = lora_ft.load(run)
    ids = torch.randint(0, 200, (3, 50))
    assert float((merged(ids).logits - loaded.model(ids).logits).detach().abs().max()) <= 1e-4
    assert not any("lora" in n for n, _ in merged.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]  # no staging folder is left
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "merged").iterdir()} == {"0o644"}  # a server may read it


def test_exported_peft_adapter_is_the_runs(run, tmp_path):
    lora_ft.export(run, str(tmp_path / "adapter"), format_name="peft")
    ours, theirs = adapter(run.adapter), adapter(tmp_path / "adapter")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_eval_judges_base_and_adapter_on_the_same_rows(run, rows_file):
    metrics, comparison, pairs = lora_ft.evaluate_run(run)
    assert metrics["before"]["loss"] == pytest.approx(run.metrics["before"]["loss"], rel=1e-5)
    assert metrics["after"]["loss"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-5)
    assert comparison is not None
    assert len(pairs) == 4
    assert comparison.both + comparison.neither + len(comparison.gained) + len(comparison.lost) == 4
    other, _, _ = lora_ft.evaluate_run(run, data=str(rows_file))
    assert other["before"]["loss"] != metrics["before"]["loss"]


def test_predictions_do_not_depend_on_the_batch(run, rows_file, tmp_path):
    for size in (1, 7):
        assert (
            lora_ft.predict(run, str(rows_file), str(tmp_path / f"{size}.jsonl"), max_new_tokens=6, batch_size=size)
            == 48
        )
    one, seven = ((tmp_path / f"{n}.jsonl").read_text().splitlines() for n in (1, 7))
    assert one == seven
    assert json.loads(one[3])["reference"] == '{"n": 3, "word": ""}'
    with pytest.raises(UsageError, match="exists"):
        lora_ft.predict(run, str(rows_file), tmp_path / "1.jsonl")


def test_an_interrupted_run_resumed_equals_an_uninterrupted_one(recipe, tmp_path, monkeypatch):
    recipe["method"]["lora_dropout"] = 0.2
    whole = lora_ft.train(recipe, out=tmp_path / "whole")

    class StopAfterTwo(Silent):
        def step(self, record):
            if record["step"] == 2:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        lora_ft.train(recipe, out=tmp_path / "cut", listener=StopAfterTwo())
    assert caught.value.exit_code == 75
    assert lora_ft.Run(tmp_path / "cut").facts["status"] == "interrupted"
    resumed = pipeline_train(load_recipe([recipe]), out=tmp_path / "cut", resume=True)
    a, b = adapter(whole.adapter), adapter(resumed.adapter)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_early_stopping_counts_only_falls_of_min_delta_but_the_best_is_the_lowest(recipe, tmp_path):
    recipe["train"] |= {"steps": 40, "eval_every": 1, "early_stopping": {"patience": 2, "min_delta": 5}}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    facts = run.facts
    losses = [r["eval_loss"] for r in records(run) if "eval_loss" in r]
    # No fall is as large as min_delta, so two evaluations after the first are waited for.
    assert facts["stopped_early"]
    assert (facts["steps"], len(losses)) == (3, 3)
    assert facts["best_step"] == 1 + losses.index(min(losses))
    # Resumed, it does not train on.
    again = lora_ft.train(recipe, out=run.path, resume=True)
    assert again.facts["steps"] == 3
    assert again.facts["tokens_per_s"] < 1e6


def test_the_adapter_with_the_lowest_loss_is_kept(recipe, tmp_path, monkeypatch):
    """Held-out losses are scripted so that the second evaluation of four is the best."""
    scripted = iter([3.0, 1.0, 2.0, 4.0])

    recipe["train"] |= {"steps": 4, "eval_every": 1}
    recipe["eval"]["generate"] = 0
    made = loop.train
    monkeypatch.setattr(
        loop, "train", lambda job, **more: made(replace(job, evaluate=lambda: {"loss": next(scripted)}), **more)
    )
    done = lora_ft.train(recipe, out=tmp_path / "run")
    assert done.facts["best_step"] == 2
    kept, best = adapter(done.adapter), adapter(done.checkpoints / "step-00000002")
    assert all(torch.equal(kept[k], best[k]) for k in kept)
    last = adapter(done.checkpoints / "step-00000004")
    assert not all(torch.equal(kept[k], last[k]) for k in kept)


def test_plateau_halves_the_rate(recipe, tmp_path):
    recipe["train"] |= {
        "steps": 5, "eval_every": 1, "lr_scheduler_type": "reduce_lr_on_plateau", "warmup_ratio": 0,
        "lr_scheduler_kwargs": {"threshold": 0.9},
    }  # fmt: skip
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert [r["lr"] for r in records(run) if "lr" in r] == [5e-3, 5e-3, 2.5e-3, 1.25e-3, 0.625e-3]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop", "adafactor"])
def test_every_optimizer_lowers_the_loss(recipe, tmp_path, optimizer):
    recipe["train"] |= {"optimizer": optimizer, "learning_rate": 0.5 if optimizer == "sgd" else 3e-3, "steps": 12}
    recipe["eval"]["generate"] = 0
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"] - 0.05


def test_a_dry_run_says_what_training_would_do_and_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = dry_run(load_recipe([recipe]))
    assert (facts["samples"], facts["held_out"], facts["steps"]) == (36, 12, 6)
    assert "[[{" in facts["sample"]
    # r x (in + out) of q, k, v, o, gate, up, down in each of 2 layers
    assert facts["trainable_parameters"] == 2 * 4 * (64 + 48 + 48 + 64 + 96 + 96 + 96)
    assert list(tmp_path.iterdir()) == []


def test_a_run_can_be_used_from_another_folder(recipe, tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(tmp_path)
    recipe["model"] = os.path.relpath(recipe["model"])
    recipe["data"]["train"] = os.path.relpath(recipe["data"]["train"])
    recipe["train"]["steps"] = 1
    run = lora_ft.train(recipe, out="run")
    wanted = run.metrics["after"]["loss"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lora_ft.evaluate_run(tmp_path / run.path)[0]["after"]["loss"] == pytest.approx(wanted)


@pytest.mark.parametrize("method", ["ia3", "vera", "loha", "lokr", "prefix_tuning", "prompt_tuning", "lora-dora"])
def test_other_peft_methods_train_through_the_same_section(recipe, tmp_path, method):
    options = {
        "lora-dora": {"type": "lora", "use_dora": True},
        "ia3": {
            "type": "ia3",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 4},
        "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 4},
    }.get(method, {"type": method})
    recipe["train"] |= {"learning_rate": 0.05, "steps": 8}
    recipe["eval"]["generate"] = 0
    run = lora_ft.train({**recipe, "method": options}, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    assert lora_ft.load(run).model.peft_config
