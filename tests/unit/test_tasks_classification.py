"""Text classification: one class or several labels, from rows to the verdict."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from lora_ft.errors import DataError, DivergedError, UsageError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.tasks.text_classification import TextClassification
from tests.tiny import tiny_tokenizer
from tests.tiny_readers import loss_and_gradient, tiny_model, word_piece

TEXTS = ["good film", "bad film", "the film was good", "bad", "good", "the the the bad film", "film", "was good good"]
SIDES = ["pos", "neg", "pos", "neg", "pos", "neg", "meh", "pos"]
SETS = [["a"], ["a", "b"], [], ["c"], ["b"], ["a", "c"], ["a"], ["b", "c"]]
OPTIONS = EncodeOptions(max_length=32, overlong="truncate")
PREDICT = PredictOptions(1, 3, OPTIONS)


def rows(labels, key="label", texts=TEXTS):
    return [Example({"text": t, key: y}, f"r.jsonl:{i}") for i, (t, y) in enumerate(zip(texts, labels, strict=True), 1)]


SINGLE, MULTI = rows(SIDES), rows(SETS, "labels")


def learnt(examples, **options):
    return TextClassification().configure(options).learn(examples, [])


def encoded(task, examples, processor, options=OPTIONS):
    encode = task.encoder(processor, options)
    return [s for e in examples for s in encode(e).samples]


def made(examples, kind="bert", **options):
    """(task, model, samples, tokenizer)"""
    task = learnt(examples, **options)
    processor = word_piece() if kind == "bert" else tiny_tokenizer(None)
    return task, tiny_model(kind, "sequence", **task.model_arguments()), encoded(task, examples, processor), processor


def test_a_pair_of_texts_is_told_apart_by_token_types():
    task = learnt(SINGLE)
    pair = Example({"text": "good film", "text_pair": "bad", "label": "pos"}, "r.jsonl:1")
    processor = word_piece()
    (sample,) = task.encoder(processor, OPTIONS)(pair).samples
    assert processor.decode(sample.inputs["input_ids"]) == "[CLS] good film [SEP] bad [SEP]"
    assert sample.inputs["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert (sample.labelled, sample.label, sample.where) == (1, "pos", "r.jsonl:1")
    assert task.show(sample, processor).endswith("[[pos]]")


def test_a_batch_holds_what_the_samples_hold():
    for examples, dtype in [(SINGLE, torch.int64), (MULTI, torch.float32)]:
        task, _, samples, processor = made(examples)
        batch = task.collate(samples, processor)
        for i, s in enumerate(samples):
            assert batch["input_ids"][i][: s.length].tolist() == s.inputs["input_ids"]
            assert batch["attention_mask"][i].sum() == s.length
            assert batch["labels"][i].tolist() == s.inputs["labels"]
        assert batch["labels"].dtype == dtype


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("examples", [SINGLE, MULTI], ids=["single", "multi"])
def test_the_loss_is_the_models_own_however_the_step_is_cut(kind, examples):
    task, model, samples, processor = made(examples, kind)
    batch = task.collate(samples, processor)
    own = float(model(**batch).loss.detach())
    whole, gradient = loss_and_gradient(task, model, samples, processor, 8)
    single, same = loss_and_gradient(task, model, samples, processor, 1)
    assert whole == pytest.approx(own, abs=1e-6)
    assert single == pytest.approx(own, abs=1e-6)
    torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3


def test_weights_and_smoothing_are_those_of_torch():
    task, model, samples, processor = made(SINGLE, class_weights={"neg": 3, "meh": 0.5}, label_smoothing_factor=0.2)
    assert task.labels == ("meh", "neg", "pos")
    assert task.weights == (0.5, 3.0, 1.0)
    batch = task.collate(samples, processor)
    labels = batch["labels"]
    logits = task.answer(model, batch).logits
    want = functional.cross_entropy(logits, labels, weight=torch.tensor([0.5, 3.0, 1.0]), label_smoothing=0.2)
    found = task.loss(model, batch)
    assert found.count == 0.5 + 3 * 3 + 4
    assert float(found.total.detach()) / found.count == pytest.approx(float(want.detach()), abs=1e-6)
    assert loss_and_gradient(task, model, samples, processor, 1)[0] == pytest.approx(float(want.detach()), abs=1e-6)


def test_weights_of_several_labels_are_torchs_pos_weight():
    task, model, samples, processor = made(MULTI, class_weights={"c": 4.0}, label_smoothing_factor=0.1)
    batch = task.collate(samples, processor)
    logits, labels = task.answer(model, batch).logits, batch["labels"]
    want = functional.binary_cross_entropy_with_logits(
        logits, labels * 0.9 + 0.05, pos_weight=torch.tensor([1.0, 1.0, 4.0])
    )
    found = task.loss(model, batch)
    assert found.count == 24
    assert float(found.total.detach()) / found.count == pytest.approx(float(want.detach()), abs=1e-6)


def test_balanced_weights_are_scikit_learns():
    task = learnt(SINGLE, class_weights="balanced")
    want = compute_class_weight("balanced", classes=np.array(task.labels), y=SIDES)
    assert task.weights == pytest.approx(want.tolist())
    several = learnt(MULTI, class_weights="balanced")
    for name, weight in zip(several.labels, several.weights, strict=True):
        without, with_it = compute_class_weight("balanced", classes=np.array([0, 1]), y=[int(name in s) for s in SETS])
        assert weight == pytest.approx(with_it / without)


def test_a_finished_run_knows_its_labels_again():
    task = learnt(SINGLE, class_weights="balanced")
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in task.facts().items()}  # as JSON gives them
    assert TextClassification().configure({"class_weights": "balanced"}).recall(facts) == task
    assert task.model_arguments() == {
        "num_labels": 3,
        "id2label": {0: "meh", 1: "neg", 2: "pos"},
        "label2id": {"meh": 0, "neg": 1, "pos": 2},
        "problem_type": "single_label_classification",
    }


def verdict(task, logits):
    """Judgement of rows that the model answered with these logits."""
    samples = encoded(task, [e for e in SINGLE + MULTI if ("labels" in e.fields) == task.multi], word_piece())
    return task.measure(samples[: len(logits)], [{"logits": torch.tensor(x)} for x in logits])


def test_metrics_of_two_classes_by_hand():
    task = learnt(rows(["no", "yes", "no", "yes"], texts=TEXTS[:4]))
    samples = encoded(task, rows(["no", "no", "yes", "yes"], texts=TEXTS[:4]), word_piece())
    # Given: no, yes, yes, yes; of 4 (yes, no) pairs 3 are in order.
    found = task.measure(samples, [{"logits": torch.tensor([0.0, x])} for x in (-1.0, 2.0, 1.0, 3.0)])
    assert found.right == [True, False, True, True]
    assert found.tables == {"confusion_matrix": {"labels": ["no", "yes"], "rows": [[1, 1], [0, 2]]}}
    assert found.metrics == pytest.approx({
        "accuracy": 0.75, "precision_macro": (1 + 2 / 3) / 2, "recall_macro": (1 / 2 + 1) / 2,
        "f1_macro": (2 / 3 + 4 / 5) / 2, "f1_micro": 0.75, "roc_auc": 0.75,
    })  # fmt: skip


def test_metrics_of_three_classes_by_hand():
    task = learnt(SINGLE)
    given = [2, 1, 2, 1, 2, 1, 0, 1]  # all right but the last
    found = verdict(task, [[4.0 * (i == g) for i in range(3)] for g in given])
    assert found.metrics["accuracy"] == 7 / 8
    assert found.metrics["recall_macro"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    # pos against the rest: 3 of 4 above all 4 others, the last level with them; neg: 3 above 4 of 5, level with one.
    assert found.metrics["roc_auc"] == pytest.approx((1 + (4.5 / 5) + (3 + 0.5) / 4) / 3)
    assert "roc_auc" not in verdict(task, [[1.0, 0.0, 0.0]] * 6).metrics  # six rows without "meh"


def test_metrics_of_label_sets_by_hand():
    task = learnt(MULTI, threshold=0.6)
    # a: given to rows 1, 2; b: to row 2, and at 0.55 not to row 1; c: to none. Wanted: [a], [a, b], [].
    low = math.log(0.55 / 0.45)
    found = verdict(task, [[3.0, low, -3.0], [3.0, 3.0, -3.0], [-3.0, -3.0, -3.0]])
    assert found.right == [True, True, True]
    assert found.metrics["accuracy"] == 1.0
    assert found.metrics["f1_macro"] == pytest.approx(2 / 3)  # nothing of c to find
    assert found.metrics["f1_micro"] == 1.0
    assert "roc_auc" not in found.metrics
    assert found.tables == {}
    whole = verdict(learnt(MULTI), [[1.0, 0.0, 0.0]] * 8)
    assert whole.metrics["roc_auc"] == 0.5


def test_a_single_label_that_rows_have_or_not_is_judged_like_any_other():
    sets = [["a"], ["a"], [], ["a"], [], [], [], []]
    task = learnt(rows(sets, "labels"))
    samples = encoded(task, rows(sets, "labels"), word_piece())
    given = [1, 0, 1, 0, 0, 0, 0, 0]  # one of three found, one of two right
    found = task.measure(samples, [{"logits": torch.tensor([4.0 * g - 2])} for g in given])
    assert found.metrics["accuracy"] == 5 / 8
    assert found.metrics["f1_macro"] == found.metrics["f1_micro"] == pytest.approx(2 / 5)
    assert found.metrics["roc_auc"] == pytest.approx((1 * 4.5 + 2 * 2) / 15)


def test_more_than_twenty_rows_of_many_classes_leak_no_warning():
    names = [f"k{i:02}" for i in range(30)]
    task = learnt(rows(names, texts=["good"] * 30))
    samples = encoded(task, rows(names, texts=["good"] * 30), word_piece())
    found = task.measure(samples, [{"logits": torch.eye(30)[i]} for i in range(30)])
    assert found.metrics["accuracy"] == found.metrics["roc_auc"] == 1.0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_predictions_are_the_models_probabilities_in_the_order_given(kind):
    task, model, samples, processor = made(SINGLE, kind)
    found = list(task.predict(model, processor, SINGLE, PREDICT))
    assert [p.where for p in found] == [e.where for e in SINGLE]
    assert [p.reference for p in found] == SIDES
    for p, s in zip(found, samples, strict=True):
        want = model(input_ids=torch.tensor([s.inputs["input_ids"]])).logits.softmax(-1)[0].tolist()
        assert list(p.details["scores"].values()) == pytest.approx(want, abs=1e-5)
        assert p.output == task.labels[want.index(max(want))]


def test_a_prediction_of_label_sets_names_all_above_the_threshold():
    task, model, _, processor = made(MULTI, threshold=0.4)
    unanswered = [Example({"text": t}, f"p.txt:{i}") for i, t in enumerate(TEXTS)]
    found = list(task.predict(model, processor, unanswered, PREDICT))
    for p in found:
        assert p.reference is None
        assert p.output == ", ".join(n for n, x in p.details["scores"].items() if x >= 0.4)
    assert len({p.output for p in found}) > 1
    assert [p.reference for p in task.predict(model, processor, MULTI, PREDICT)][1:3] == ["a, b", ""]


def test_long_rows_are_cut_counted_or_refused():
    task, processor = learnt(SINGLE), word_piece()
    long = Example({"text": "good " * 50, "text_pair": "bad", "label": "pos"}, "r.jsonl:9")
    cut = task.encoder(processor, OPTIONS)(long)
    assert cut.outcome == "truncated"
    assert cut.samples[0].length == 32
    assert processor.decode(cut.samples[0].inputs["input_ids"]).endswith("[SEP] bad [SEP]")
    for overlong, outcome in [("drop", "dropped: longer than max_length"), ("error", "over max_length")]:
        kept = task.encoder(processor, replace(OPTIONS, overlong=overlong))(long)
        assert (kept.samples, kept.outcome) == ((), outcome)
    model = tiny_model("bert", "sequence", **task.model_arguments())
    assert [p.cut for p in task.predict(model, processor, [long, SINGLE[0]], PREDICT)] == [True, False]


def test_labels_that_training_never_saw_are_named_with_their_rows():
    with pytest.raises(
        DataError, match="the label 'poss' of a held-out row is in no training row; did you mean 'pos'"
    ) as e:
        TextClassification().configure({}).learn(SINGLE, rows(["neg", "poss"], texts=TEXTS[:2]))
    assert e.value.where == "r.jsonl:2"
    with pytest.raises(DataError, match="only the label 'pos'"):
        learnt(rows(["pos"] * 8))
    with pytest.raises(DataError, match="no label at all"):
        learnt(rows([[]] * 8, "labels"))
    with pytest.raises(DataError, match="the row has no label") as e:
        learnt([*SINGLE, Example({"text": "x", "label": " "}, "r.jsonl:9")])
    assert e.value.where == "r.jsonl:9"
    with pytest.raises(DataError, match=r"task.problem_type is single_label_classification"):
        learnt(MULTI, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="the label 'poss' is not known; did you mean 'pos'"):
        encoded(learnt(SINGLE), rows(["poss"], texts=["good"]), word_piece())


def test_options_that_are_wrong_are_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="no label is called 'negg'; did you mean 'neg'"):
        learnt(SINGLE, class_weights={"negg": 2})
    with pytest.raises(UsageError, match=r"task.class_weights: must be 'balanced', or a weight above 0 for each label"):
        learnt(SINGLE, class_weights={"neg": 0})
    with pytest.raises(UsageError, match="no such option; did you mean 'threshold'"):
        learnt(SINGLE, treshold=0.4)


def test_a_row_without_a_token_is_refused():
    with pytest.raises(ValueError, match="the text gives no token"):
        encoded(learnt(SINGLE), rows(["pos"], texts=[""]), tiny_tokenizer(None))


def test_an_answer_that_is_no_number_has_no_verdict():
    task = learnt(SINGLE)
    with pytest.raises(DivergedError, match="answer to 1 of 2 rows") as e:
        verdict(task, [[0.0, 1.0, 0.0], [0.0, float("nan"), 0.0]])
    assert e.value.where == "r.jsonl:2"
