"""Regression: numbers learnt standardised, judged and given in the labels' unit."""

import math

import pytest
import torch
from sklearn import metrics

from lora_ft.errors import DataError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.tasks.regression import Regression
from tests.tiny_readers import loss_and_gradient, tiny_model, word_piece

TEXTS = ["good film", "bad film", "the film was good", "bad", "good", "the bad film", "film", "was good good"]
NUMBERS = [120.0, 80, "130.5", "-7", 100, 90, 1e2, 125]
OPTIONS = EncodeOptions(max_length=32, overlong="truncate")


def rows(labels):
    return [
        Example({"text": t, "label": y}, f"r.csv:{i}") for i, (t, y) in enumerate(zip(TEXTS, labels, strict=False), 2)
    ]


ROWS = rows(NUMBERS)


def made(**options):
    """(task, model, samples, tokenizer)"""
    task, processor = Regression().configure(options).learn(ROWS, ROWS[:2]), word_piece()
    encode = task.encoder(processor, OPTIONS)
    model = tiny_model("bert", "sequence", **task.model_arguments())
    return task, model, [s for e in ROWS for s in encode(e).samples], processor


@pytest.mark.parametrize("standardize", [True, False])
def test_the_loss_is_the_models_own_however_the_step_is_cut(standardize):
    task, model, samples, processor = made(standardize=standardize)
    batch = task.collate(samples, processor)
    own = float(model(**batch).loss.detach())
    whole, gradient = loss_and_gradient(task, model, samples, processor, 8)
    single, same = loss_and_gradient(task, model, samples, processor, 1)
    assert whole == pytest.approx(own, rel=1e-6)
    assert single == pytest.approx(own, rel=1e-6)
    torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_what_is_learnt_has_mean_zero_and_deviation_one():
    task, _, samples, processor = made()
    learnt = torch.tensor([s.inputs["labels"] for s in samples], dtype=torch.double)
    assert float(learnt.mean()) == pytest.approx(0, abs=1e-12)
    assert float(learnt.std(correction=0)) == pytest.approx(1)
    assert task.show(samples[3], processor).endswith("[[-7]]")
    plain = made(standardize=False)[2]
    assert [s.inputs["labels"] for s in plain] == [120.0, 80.0, 130.5, -7.0, 100.0, 90.0, 100.0, 125.0]


def test_metrics_have_the_unit_of_the_labels():
    task, model, samples, processor = made()
    logits = [task.answer(model, task.collate([s], processor)).logits[0].detach() for s in samples]
    found = task.measure(samples, [{"logits": x} for x in logits])
    given = [float(x) * task.std + task.mean for x in logits]
    wanted = [float(n) for n in NUMBERS]
    assert found.right == []
    assert found.metrics["mse"] == pytest.approx(metrics.mean_squared_error(wanted, given), rel=1e-5)
    assert found.metrics["mae"] == pytest.approx(metrics.mean_absolute_error(wanted, given), rel=1e-5)
    assert found.metrics["r2"] == pytest.approx(metrics.r2_score(wanted, given), rel=1e-5)
    assert found.metrics["mse"] == pytest.approx(
        float(task.loss(model, task.collate(samples, processor)).total.detach()) / 8 * task.std**2, rel=1e-4
    )


def test_metrics_by_hand():
    task, _, samples, _ = made(standardize=False)
    chosen = [samples[i] for i in (0, 1, 4)]  # 120, 80, 100
    found = task.measure(chosen, [{"logits": torch.tensor([x])} for x in (110.0, 90.0, 100.0)])
    assert found.metrics == pytest.approx({"mse": 200 / 3, "mae": 20 / 3, "r2": 1 - 200 / 800, "pearson": 1.0})
    flat = task.measure(chosen, [{"logits": torch.tensor([100.0])}] * 3)
    assert flat.metrics["pearson"] == 0.0
    assert set(task.measure([samples[4], samples[6]], [{"logits": torch.tensor([1.0])}] * 2).metrics) == {"mse", "mae"}


def test_predictions_have_the_unit_of_the_labels():
    task, model, samples, processor = made()
    found = list(task.predict(model, processor, ROWS, PredictOptions(1, 3, OPTIONS)))
    for p, s in zip(found, samples, strict=True):
        value = float(task.answer(model, task.collate([s], processor)).logits.detach()) * task.std + task.mean
        assert p.details["value"] == pytest.approx(value, abs=1e-5 * task.std)
        assert float(p.output) == pytest.approx(p.details["value"], rel=1e-5)
    assert [p.reference for p in found[:3]] == ["120.0", "80", "130.5"]
    (alone,) = task.predict(model, processor, [Example({"text": "good"}, "p:1")], PredictOptions(1, 3, OPTIONS))
    assert alone.reference is None
    assert math.isfinite(alone.details["value"])


def test_a_finished_run_knows_the_unit_again():
    task = made()[0]
    assert Regression().configure({}).recall(task.facts()) == task
    assert Regression().recall({"mean": 1.0, "std": 2.0}).std == 2.0


@pytest.mark.parametrize("bad", ["many", "nan", float("inf"), "1e39", None, "", True, "1_0"])
def test_labels_that_are_no_finite_number_are_named_with_their_row(bad):
    for train, held in [([*ROWS, *rows([bad])], []), (ROWS, rows([bad]))]:
        with pytest.raises(DataError, match="is no finite number") as e:
            Regression().configure({}).learn(train, held)
        assert e.value.where == "r.csv:2"


def test_labels_that_are_all_the_same_teach_nothing():
    with pytest.raises(DataError, match=r"all 8 training rows have the label 0.1"):
        Regression().configure({}).learn(rows([0.1] * 8), [])
