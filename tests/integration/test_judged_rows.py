"""Which held-out rows a finished run is judged on, and what of it is told."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

import lora_ft
from lora_ft.errors import UsageError
from lora_ft.models.resolve import resolve
from lora_ft.records import Silent

MODULE = {
    "task": {"type": "module", "loss": "cross_entropy"}, "method": {"type": "full"},
    "train": {"steps": 4, "learning_rate": 1e-2}, "data": {"eval": "25%"},
}  # fmt: skip


class Told(Silent):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def arrays(seed):
    x = np.random.default_rng(seed).normal(size=(48, 4)).astype("float32")
    return x, (x[:, 0] > 0).astype(int)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_the_callers_module_stays_as_it_is(module, tmp_path):
    before = copy.deepcopy(module.state_dict())
    module.train()
    run = lora_ft.train(MODULE, out=tmp_path / "run", model=module, train_data=arrays(0))
    assert all(p.requires_grad for p in module.parameters())
    assert module.training
    assert [type(m) for m in module] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    again = lora_ft.train(MODULE, out=tmp_path / "again", model=module, train_data=arrays(0))
    assert again.metrics == run.metrics
    lora_ft.merge(run, tmp_path / "merged", given=lora_ft.Given(model=module))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_rows_in_memory_are_judged_again_or_asked_for(module, tmp_path):
    part = lora_ft.train(MODULE, out=tmp_path / "part", model=module, train_data=arrays(0))
    given = lora_ft.Given(model=module, train=arrays(0))
    assert lora_ft.evaluate_run(part, given=given)[0] == part.metrics
    with pytest.raises(UsageError, match="held-out rows of this run were in memory") as caught:
        lora_ft.evaluate_run(part, given=lora_ft.Given(model=module))
    assert "--data FILE" in caught.value.fix
    assert "train=THE_SAME_ROWS" in caught.value.fix
    own = lora_ft.train(MODULE, out=tmp_path / "own", model=module, train_data=arrays(0), eval_data=arrays(1))
    held = lora_ft.Given(model=module, held_out=arrays(1))
    assert lora_ft.evaluate_run(own, given=held)[0] == own.metrics != part.metrics
    with pytest.raises(UsageError, match="were in memory") as caught:
        lora_ft.evaluate_run(own, given=given)
    assert "held_out=THE_SAME_ROWS" in caught.value.fix


def test_held_out_rows_that_are_dropped_are_told_of(run, tmp_path):
    rows = [{"prompt": "say 1", "completion": "1"}] * 3 + [{"prompt": "say 2", "completion": "ab " * 300}]
    told = Told()
    lora_ft.evaluate_run(run, data=write(tmp_path / "held.jsonl", rows), listener=told)
    assert any(w.startswith("1 of 4 held-out rows: dropped") for w in told.warnings)


def test_a_metric_that_was_asked_for_is_computed_on_long_answers_too(tmp_path):
    rows = [{"prompt": f"the ball {i}", "completion": "the ball is red " * 35} for i in range(12)]
    recipe = {
        "model": "builtin:tiny-t5", "task": {"type": "seq2seq-lm", "metrics": ["rouge_l"]}, "method": {"type": "lora"},
        "data": {"train": write(tmp_path / "rows.jsonl", rows), "eval": "25%", "max_length": 800},
        "train": {"steps": 1, "batch_size": 4, "dtype": "float32"}, "eval": {"max_new_tokens": 4},
    }  # fmt: skip
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert "rouge_l" in run.metrics["after"]
    recipe["task"].pop("metrics")
    auto, told = lora_ft.train(recipe, out=tmp_path / "auto"), Told()
    assert "rouge_l" not in auto.metrics["after"]
    lora_ft.evaluate_run(auto, listener=told)
    assert len([n for n in told.notes if "held-out answers are not written" in n]) == 1


def test_rows_longer_than_a_robertas_last_position_are_cut_to_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin:tiny-bert", lambda _: None))
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=tokenizer.pad_token_id or 0, type_vocab_size=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": f"the ball is {('red', 'green')[i % 2]} " + "so " * 60, "label": i % 2} for i in range(20)]
    told = Told()
    run = lora_ft.train(
        {
            "model": str(tmp_path / "base"), "task": "text-classification", "method": {"type": "lora", "r": 2},
            "data": {"train": write(tmp_path / "rows.jsonl", rows)}, "train": {"steps": 1, "dtype": "float32"},
        },
        out=tmp_path / "run", listener=told,
    )  # fmt: skip
    usable = 34 - config.pad_token_id - 1
    assert run.facts["encode"]["max_length"] == usable
    assert f"a sample holds at most {usable} tokens, all that this base can read" in told.notes


def test_the_group_column_of_a_table_is_no_feature_in_eval_and_predict(tmp_path):
    lines = [f"{i % 7 - 3},{i % 5},{i // 2},{int(i % 7 > 3)}" for i in range(40)]
    (tmp_path / "train.csv").write_text("a,b,g,target\n" + "\n".join(lines) + "\n")
    (tmp_path / "held.csv").write_text(
        "b,a,target\n" + "\n".join(f"{i % 5},{i % 7 - 3},{i % 2}" for i in range(6)) + "\n"
    )
    run = lora_ft.train(
        {
            "model": "python:lora_ft.models.architectures:mlp",
            "task": {"type": "module", "loss": "binary_cross_entropy",
                     "arguments": {"sizes": [2, 4, 1], "output": "sigmoid"}},
            "data": {"train": str(tmp_path / "train.csv"), "eval": "25%", "group_column": "g"},
            "method": "full", "train": {"steps": 2},
        },
        out=tmp_path / "run",
    )  # fmt: skip
    for name in ("train", "held"):
        assert lora_ft.evaluate_run(run, data=str(tmp_path / f"{name}.csv"))[0]["after"]["loss"] > 0
    assert lora_ft.predict(run, str(tmp_path / "train.csv"), tmp_path / "out.jsonl") == 40
