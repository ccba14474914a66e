"""A user's module answers rows in their order, rows without an answer too, and columns are told apart by name."""

import json

import numpy as np
import pytest
import torch

from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from tests.unit.test_tasks_module import CASES, data, examples, model_for, prepared


def answers(loss, rows, model, **options):
    task, _ = prepared({"loss": loss, **options}, examples(*data(CASES[loss][0])))
    return list(task.predict(model, None, rows, PredictOptions(1, 2, EncodeOptions())))


def test_predictions_have_the_class_or_the_value_and_come_in_order():
    x, y = data("class")
    model = model_for(3, None)
    names = ["low", "middle", "high"]
    found = answers("cross_entropy", examples(x[:3], [y[0], None, "high"]), model, labels=names)
    scores = model(torch.tensor(x[:3], dtype=torch.float32)).softmax(-1)
    assert [p.output for p in found] == [names[i] for i in scores.argmax(-1)]
    assert [p.reference for p in found] == ["low", None, "high"]
    assert [p.where for p in found] == ["train[0]", "train[1]", "train[2]"]
    assert list(found[0].details["scores"]) == names
    assert list(found[2].details["scores"].values()) == pytest.approx(scores[2].tolist())

    model = model_for(1, "sigmoid")
    found = answers("binary_cross_entropy", examples(x[:2], [1, None]), model, threshold=0.999)
    yes = float(model(torch.tensor(x[:1], dtype=torch.float32)).detach())
    assert (found[0].output, found[0].reference) == ("0", "1")
    assert found[0].details["scores"] == pytest.approx({"0": 1 - yes, "1": yes})

    model = model_for(2, None)
    found = answers("l1_loss", examples(x[:1], [[1.0, 2.5]]), model)
    assert found[0].reference == "1, 2.5"
    assert found[0].details["value"] == pytest.approx(model(torch.tensor(x[:1], dtype=torch.float32))[0].tolist())
    assert json.loads(json.dumps(dict(found[0].details))) == found[0].details


def test_a_row_to_predict_may_lack_what_only_training_needs():
    task, samples = prepared({"loss": "cross_entropy"}, examples(*data("class")))
    (sample,) = task.encoder(None, EncodeOptions())(Example({"inputs": [1, 2, 3]}, "new")).samples
    assert (sample.labelled, sample.label) == (0, "")
    assert "labels" not in task.collate([sample, samples[0]], None)
    assert samples[1].label == "1"
    assert task.show(samples[0], None).endswith("-> [[0]]")


def test_columns_in_another_order_are_told_apart_by_name():
    def row(columns, numbers):
        return Example({"inputs": np.array(numbers), "columns": tuple(columns), "target": 1.0}, "f:1")

    task = TASKS.get("module").configure({"loss": "mse_loss"}).learn([row("ab", [1.0, 2.0])], [])
    encode = task.encoder(None, EncodeOptions())
    assert encode(row("ba", [2.0, 1.0])).samples[0].inputs["inputs"].tolist() == [1.0, 2.0]
    for columns, says in (("ac", "lacks b and has c"), ("abc", "has c beside them")):
        with pytest.raises(ValueError, match=says):
            encode(row(columns, [1.0] * len(columns)))
