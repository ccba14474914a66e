"""What held-out rows are judged by: the text's own loss, and only figures that are finite."""

import math

import pytest
import torch
from torch import nn

from lora_ft.errors import DataError, DivergedError
from lora_ft.evaluate import evaluate
from lora_ft.pipeline.judge import Judge, unsmoothed
from lora_ft.records import EncodeOptions, Example, LossSum, Sample, Silent
from lora_ft.registry import TASKS
from tests.conftest import tiny_llama

ROWS = [Example({"prompt": f"say {i}", "completion": "ab" * (1 + i % 3)}, f"f:{i}") for i in range(6)]


def samples_of(task, tokenizer):
    encode = task.encoder(tokenizer, EncodeOptions(64))
    return [s for e in ROWS for s in encode(e).samples]


def test_label_smoothing_is_no_part_of_held_out_loss_or_perplexity(tokenizer):
    model = tiny_llama(len(tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # sure of what it says, so that smoothing changes its loss
    plain, smooth = (TASKS.get("causal-lm").configure(o) for o in ({}, {"label_smoothing_factor": 0.3}))
    samples = samples_of(plain, tokenizer)
    judges = [Judge(t, model, tokenizer, t.loss, Silent()) for t in (plain, smooth)]
    by_each = [judge.held_out(samples, 256, "x")().metrics for judge in judges]
    assert by_each[0]["perplexity"] == pytest.approx(by_each[1]["perplexity"], rel=1e-6)
    batches = [plain.collate([s], tokenizer) for s in samples]
    with torch.no_grad():
        means = [float(model(**b).loss) for b in batches]
    counts = [int((b["labels"] != -100).sum()) for b in batches]
    mean = sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts)
    assert by_each[1]["loss"] == pytest.approx(mean, rel=1e-5)
    assert by_each[1]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    with torch.no_grad():
        trained = smooth.loss(model, smooth.collate(samples, tokenizer))
    assert float(trained.total) / trained.count != pytest.approx(mean, rel=1e-3)  # training still smooths


@pytest.mark.parametrize("name", sorted(TASKS.discover()))
def test_every_task_that_smooths_is_judged_without(name):
    task = TASKS.get(name)
    if "label_smoothing_factor" not in type(task.options).model_fields:
        assert unsmoothed(task) is task
        return
    options = {"loss": "cross_entropy"} if name == "module" else {}
    smooth = task.configure({**options, "label_smoothing_factor": 0.2})
    assert unsmoothed(smooth) == task.configure(options)
    assert smooth.options.label_smoothing_factor == 0.2


def judged(losses, counts):
    """`evaluate` over samples of one token, two at a time, with these losses."""
    samples = [Sample({"n": i}, 1, 1, f"rows.jsonl:{i + 1}") for i in range(len(losses))]

    def loss(_model, batch):
        chosen = [s.inputs["n"] for s in batch["samples"]]
        return LossSum(torch.tensor([losses[n] for n in chosen]).sum(), sum(counts[n] for n in chosen))

    groups = [list(range(i, min(i + 2, len(losses)))) for i in range(0, len(losses), 2)]
    return evaluate(nn.Linear(1, 1), samples, groups, lambda s: {"samples": list(s)}, loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_rows_and_makes_no_metrics(bad):
    with pytest.raises(DivergedError, match=f"the loss of held-out rows is {bad}") as caught:
        judged([1.0, 1.0, 1.0, bad, 1.0], [1] * 5)
    assert caught.value.where == "rows.jsonl:3, rows.jsonl:4"
    assert caught.value.exit_code == 7
    assert judged([1.0, 2.0, 3.0], [1] * 3).means == {"loss": 2.0}


def test_rows_without_a_label_are_named():
    with pytest.raises(DataError, match="no held-out row carries a label") as caught:
        judged([0.0] * 10, [0] * 10)
    assert caught.value.where.endswith("rows.jsonl:8 and 2 more")
