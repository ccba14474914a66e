"""A user's module learns with torch's own loss, whatever the batch is cut into, and its answers are judged right."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from lora_ft.errors import DataError, DivergedError, UsageError
from lora_ft.models.architectures import mlp
from lora_ft.records import EncodeOptions, Example
from lora_ft.registry import TASKS
from lora_ft_adapters import add_adapter, build_config

ROWS = 24
F = nn.functional


def examples(inputs, targets, where="train"):
    return [
        Example({"inputs": x} if y is None else {"inputs": x, "target": y}, f"{where}[{i}]")
        for i, (x, y) in enumerate(zip(inputs, targets, strict=True))
    ]


def prepared(options, rows, held=()):
    task = TASKS.get("module").configure(options).learn(rows, held)
    task = TASKS.get("module").configure(options).recall(json.loads(json.dumps(task.facts())))
    encode = task.encoder(None, EncodeOptions())
    return task, [s for e in rows for s in encode(e).samples]


def data(kind, width=3, seed=0):
    """(inputs, targets) with structure that a model can learn."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, width))
    if kind == "binary":
        return x, [int(v) for v in x[:, 0] > 0]
    if kind == "labels":
        return x, (x > 0).astype(int)
    if kind == "class":
        return x, [int(v) for v in np.arange(ROWS) % 3]
    if kind == "number":
        return x, [float(v) for v in x @ np.arange(1, width + 1)]
    return x, x[:, :2] * 2


CASES = {
    "binary_cross_entropy": ("binary", 1, "sigmoid"),
    "binary_cross_entropy_with_logits": ("labels", 3, None),
    "cross_entropy": ("class", 3, None),
    "nll_loss": ("class", 3, "log"),
    "mse_loss": ("number", 1, None),
    "l1_loss": ("numbers", 2, None),
    "smooth_l1_loss": ("number", 1, None),
    "huber_loss": ("numbers", 2, None),
}


def model_for(out, output, seed=0):
    torch.manual_seed(seed)
    if output == "log":
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, out), nn.LogSoftmax(-1))
    return mlp([3, 8, out], activation="tanh", output=output)


@pytest.mark.parametrize("loss", CASES)
def test_the_loss_is_torchs_mean(loss):
    kind, out, output = CASES[loss]
    x, y = data(kind)
    task, samples = prepared({"loss": loss}, examples(x, y))
    model = model_for(out, output)
    found = task.loss(model, task.collate(samples, None))
    given = model(torch.tensor(x, dtype=torch.float32))
    target = torch.tensor(np.array(y))
    target = target if kind == "class" else target.float().reshape(given.shape)
    torch.testing.assert_close(found.total / found.count, getattr(F, loss)(given, target))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, {"0": 2.0, "2": 0.5}, "balanced"])
def test_weights_and_smoothing_are_those_of_cross_entropy(weights, smoothing):
    x, _ = data("class")
    y = [0] * 12 + [1] * 8 + [2] * 4
    options = {"loss": "cross_entropy", "class_weights": weights, "label_smoothing_factor": smoothing}
    task, samples = prepared(options, examples(x, y))
    model = model_for(3, None)
    found = task.loss(model, task.collate(samples, None))
    vector = {None: None, "balanced": [24 / 36, 1.0, 2.0]}.get(
        weights if not isinstance(weights, dict) else "", [2, 1, 0.5]
    )
    wanted = F.cross_entropy(
        model(torch.tensor(x, dtype=torch.float32)), torch.tensor(y), label_smoothing=smoothing,
        weight=None if vector is None else torch.tensor(vector, dtype=torch.float32),
    )  # fmt: skip
    torch.testing.assert_close(found.total / found.count, wanted)


def test_classes_of_positions_and_probabilities_of_classes_are_taken_as_torch_takes_them():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 2, 5)).astype(np.float32)
    places = rng.integers(0, 3, size=(6, 5))
    places[0, :2] = -100
    model = nn.Conv1d(2, 3, 1)
    task, samples = prepared({"loss": "cross_entropy"}, examples(x, places))
    found = task.loss(model, task.collate(samples, None))
    torch.testing.assert_close(found.total / found.count, F.cross_entropy(model(torch.tensor(x)), torch.tensor(places)))
    given = [{k: v[i] for k, v in found.outputs.items()} for i in range(6)]
    judged = task.measure(samples, given)
    best = model(torch.tensor(x)).argmax(1).numpy()
    counted = places != -100
    assert judged.metrics["accuracy"] == pytest.approx((best == places)[counted].mean())
    assert judged.right == [bool(((b == p) | (p == -100)).all()) for b, p in zip(best, places, strict=True)]

    soft = rng.dirichlet(np.ones(3), size=6)
    flat = nn.Linear(4, 3)
    task, samples = prepared({"loss": "cross_entropy"}, examples(x[:, :, :2].reshape(6, 4), soft))
    found = task.loss(flat, task.collate(samples, None))
    wanted = F.cross_entropy(flat(torch.tensor(x[:, :, :2].reshape(6, 4))), torch.tensor(soft, dtype=torch.float32))
    torch.testing.assert_close(found.total / found.count, wanted)
    assert samples[0].label == str(soft[0].argmax())


@pytest.mark.parametrize("loss", CASES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_batch_of_eight_gives_the_gradient_of_eight_batches_of_one(loss, method):
    kind, out, output = CASES[loss]
    task, samples = prepared({"loss": loss}, examples(*data(kind)))
    base = model_for(out, output).double()
    options = {"r": 2, "target_modules": "all-linear"} if method == "lora" else {}
    model = add_adapter(base, build_config(method, options, task.peft_task_type, base))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)

    def gradient(groups):
        count = 0.0
        for group in groups:
            found = task.loss(model, task.collate(group, None))
            found.total.backward()
            count += found.count
        gradients = [p.grad / count for p in trained]
        model.zero_grad()
        return gradients

    whole, parts = gradient([samples[:8]]), gradient([[s] for s in samples[:8]])
    assert any(g.abs().max() > 1e-6 for g in whole)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def judged(loss, out, output, y, x=None, **options):
    kind = CASES[loss][0]
    x = data(kind)[0] if x is None else x
    task, samples = prepared({"loss": loss, **options}, examples(x, y))
    model = model_for(out, output)
    with torch.no_grad():
        found = task.loss(model, task.collate(samples, None))
        answer = model(torch.tensor(x, dtype=torch.float32)).double().numpy()
    rows = [{k: v[i] for k, v in found.outputs.items()} for i in range(len(samples))]
    return task.measure(samples, rows), answer


def test_yes_and_no_are_judged_as_scikit_learn_does_with_the_threshold():
    y = data("binary")[1]
    found, answer = judged("binary_cross_entropy", 1, "sigmoid", y)
    threshold = float(np.sort(answer[:, 0])[16])
    found, _ = judged("binary_cross_entropy", 1, "sigmoid", y, threshold=threshold)
    given = (answer[:, 0] >= threshold).astype(int)
    assert given.sum() == 8
    assert found.metrics["accuracy"] == metrics.accuracy_score(y, given)
    assert found.metrics["f1_macro"] == pytest.approx(metrics.f1_score(y, given, average="macro"))
    assert found.metrics["roc_auc"] == pytest.approx(metrics.roc_auc_score(y, answer[:, 0]))
    assert found.tables["confusion_matrix"]["rows"] == metrics.confusion_matrix(y, given).tolist()
    assert found.right == [g == w for g, w in zip(given, y, strict=True)]


def test_several_labels_classes_and_numbers_are_judged_as_scikit_learn_does():
    y = data("labels")[1]
    found, answer = judged("binary_cross_entropy_with_logits", 3, None, y)
    given = (answer >= 0).astype(int)
    assert found.metrics["precision_macro"] == pytest.approx(
        metrics.precision_score(y, given, average="macro", zero_division=0)
    )
    assert found.metrics["roc_auc"] == pytest.approx(metrics.roc_auc_score(y, answer, average="macro"))

    y = data("class")[1]
    found, answer = judged("cross_entropy", 3, None, y)
    assert found.metrics["recall_macro"] == pytest.approx(metrics.recall_score(y, answer.argmax(1), average="macro"))
    scores = torch.tensor(answer, dtype=torch.float64).softmax(1).numpy()
    assert found.metrics["roc_auc"] == pytest.approx(metrics.roc_auc_score(y, scores, multi_class="ovr"))

    y = np.array(data("numbers")[1], dtype=np.float32).astype(np.float64)
    found, answer = judged("huber_loss", 2, None, y)
    assert found.metrics["mse"] == pytest.approx(metrics.mean_squared_error(y, answer))
    assert found.metrics["mae"] == pytest.approx(metrics.mean_absolute_error(y, answer))
    assert found.metrics["r2"] == pytest.approx(metrics.r2_score(y, answer))
    each = [np.corrcoef(y[:, i], answer[:, i])[0, 1] for i in range(2)]
    assert found.metrics["pearson"] == pytest.approx(np.mean(each))
    assert found.right == []


def test_shares_between_no_and_yes_are_judged_by_their_error():
    y = list(np.linspace(0, 1, ROWS))
    found, answer = judged("binary_cross_entropy", 1, "sigmoid", y)
    assert found.metrics["mae"] == pytest.approx(metrics.mean_absolute_error(y, answer[:, 0]))
    assert "accuracy" not in found.metrics


def test_a_diverged_model_is_no_bug_of_the_metrics():
    task, samples = prepared({"loss": "mse_loss"}, examples(*data("number")))
    bad = [{"logits": torch.tensor([float("nan")])}] * ROWS
    with pytest.raises(DivergedError, match="24 of 24 rows"):
        task.measure(samples, bad)
    model = model_for(1, "sigmoid")
    model.layers[0].weight.data.fill_(float("nan"))
    task, samples = prepared({"loss": "binary_cross_entropy"}, examples(*data("binary")))
    assert task.loss(model, task.collate(samples, None)).total.isnan()  # the loop ends the run, not a ValueError


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4), nn.Linear(6, 2)

    def forward(self, features, ids, mask):
        pooled = (self.words(ids) * mask[..., None]).sum(1)
        assert mask.dtype == torch.bool
        return (self.out(torch.cat([pooled, features], 1)), "something else")


def test_named_inputs_keep_their_kinds_and_the_first_part_of_a_tuple_counts():
    rng = np.random.default_rng(0)
    rows = [
        {"ids": rng.integers(0, 9, 5), "features": rng.normal(size=2), "mask": rng.random(5) > 0.5} for _ in range(4)
    ]
    task, samples = prepared({"loss": "cross_entropy"}, examples(rows, [0, 1, 1, 0]))
    model = Named().bfloat16()
    batch = task.collate(samples, None)
    assert {k: v.dtype for k, v in batch.items()} == {
        "inputs.ids": torch.int64, "inputs.features": torch.float32, "inputs.mask": torch.bool, "labels": torch.int64,
    }  # fmt: skip
    probe = task.probes(samples[:1], None)[0]
    torch.testing.assert_close(task.outputs(model, probe)[0], task.outputs(model, batch)[0], rtol=0.05, atol=0.05)
    assert task.loss(model, batch).total.dtype == torch.float32


@pytest.mark.parametrize("output", ["logits", "dict"])
def test_an_object_with_logits_counts(output):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            found = self.layer(x)
            return type("Output", (), {"logits": found})() if output == "logits" else {"logits": found}

    task, samples = prepared({"loss": "mse_loss"}, examples(*data("number")))
    model, batch = Wrapped(), task.collate(samples, None)
    if output == "logits":
        assert torch.equal(task.outputs(model, batch), model.layer(batch["inputs"]))
    else:
        with pytest.raises(UsageError, match="gives a dict for 24 rows"):
            task.outputs(model, batch)


def test_whole_numbers_become_floating_unless_the_model_looks_them_up():
    x = [[1, 2, 3], [0, 2, 1]]
    linear, lookup = nn.Linear(3, 1), nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 1))
    for options, model, works in (
        ({}, linear, True), ({"input_dtype": "keep"}, linear, False), ({}, lookup, True),
        ({"input_dtype": "float"}, lookup, False),
    ):  # fmt: skip
        task, samples = prepared({"loss": "mse_loss", **options}, examples(x, [0.5, 1.0]))
        batch = task.collate(samples, None)
        if works:
            assert task.loss(model, batch).total.isfinite()
        else:
            with pytest.raises(UsageError, match="does not take a batch"):
                task.loss(model, batch)
    task, samples = prepared({"loss": "mse_loss"}, examples([[1, 2, 3], [0.5, 2, 1]], [0.5, 1.0]))
    assert task.collate(samples, None)["inputs"].dtype == torch.float32


BAD_ROWS = [
    ("mse_loss", [1.0, float("nan")], 1.0, "1 of 2 numbers of inputs are NaN"),
    ("mse_loss", [1.0, 1e300], 1.0, "too large for float32"),
    ("mse_loss", [1.0], 1.0, "inputs has the shape .1., in the first row it is .2."),
    ("mse_loss", [[1.0, 2.0], [3.0]], 1.0, "lists of different lengths"),
    ("mse_loss", ["a", "b"], 1.0, "inputs must hold numbers, got .'a', 'b'."),
    ("mse_loss", {"a": [1.0, 2.0]}, 1.0, "the row has no inputs, which the first row has"),
    ("mse_loss", None, 1.0, "the row has no inputs"),
    ("mse_loss", [1.0, 2.0], [1.0, 2.0], "target has the shape .2., in the first row it is of a single number"),
    ("mse_loss", [1.0, 2.0], float("inf"), "1 of 1 numbers of target"),
    ("binary_cross_entropy", [1.0, 2.0], 1.5, "from 0 to 1 for binary cross entropy, got 1.5"),
    ("cross_entropy", [1.0, 2.0], 1.5, "a whole number from 0, got 1.5"),
    ("cross_entropy", [1.0, 2.0], -1, "a whole number from 0, got -1"),
    ("cross_entropy", [1.0, 2.0], "cat", "target is text .'cat'.: list the classes in task.labels"),
]


@pytest.mark.parametrize(("loss", "inputs", "target", "said"), BAD_ROWS)
def test_a_bad_row_is_named(loss, inputs, target, said):
    good = examples([[1.0, 2.0]] * 3, [0, 1, 1])
    bad = [Example({"inputs": inputs, "target": target}, "train[3]")]
    with pytest.raises((DataError, ValueError), match=said) as caught:
        prepared({"loss": loss}, [*good, *bad])
    if isinstance(caught.value, DataError):
        assert caught.value.where == "train[3]"
    task, _ = prepared({"loss": loss}, good)
    with pytest.raises(ValueError, match=said):  # as `encode_all` and `predict` collect it with file and line
        task.encoder(None, EncodeOptions())(bad[0])


def test_a_class_without_an_output_names_the_row_and_the_size():
    task, samples = prepared({"loss": "cross_entropy"}, examples(*data("class")))
    with pytest.raises(DataError, match="class 2 does not exist: the model gives 2 outputs") as caught:
        task.loss(model_for(2, None), task.collate(samples, None))
    assert caught.value.where == "train[2]"
    assert "3 wide" in caught.value.fix


@pytest.mark.parametrize(
    ("loss", "model", "said"),
    [
        ("binary_cross_entropy", mlp([3, 1]), "needs outputs from 0 to 1.*"),
        ("mse_loss", mlp([3, 2]), "output .24, 2. does not fit the targets .24,."),
        ("mse_loss", mlp([4, 1]), "does not take a batch"),
        ("mse_loss", nn.Sequential(mlp([3, 1]), nn.Flatten(0), nn.Unflatten(0, (6, 4))), "shape .6, 4. for 24 rows"),
    ],
)
def test_a_model_that_does_not_fit_is_an_error_that_says_why(loss, model, said):
    y = data("binary" if loss.startswith("binary") else "number")[1]
    task, samples = prepared({"loss": loss}, examples(data("number")[0], y))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    with pytest.raises(UsageError, match=said) as caught:
        task.loss(model, task.collate(samples, None))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "which loss"),
        ({"loss": "cross_entropie"}, "did you mean 'cross_entropy'"),
        ({"loss": "mse_loss", "label_smoothing_factor": 0.1}, "goes with cross_entropy, not with mse_loss"),
        ({"loss": "mse_loss", "class_weights": "balanced"}, "class_weights go with cross_entropy"),
        ({"loss": "mse_loss", "labels": ["a", "b"]}, "labels go with classes"),
        ({"loss": "mse_loss", "threshhold": 0.2}, "did you mean 'threshold'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UsageError, match=said):
        TASKS.get("module").configure(options)
