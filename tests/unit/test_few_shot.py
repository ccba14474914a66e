"""Few-shot heads: equal to scikit-learn's on features from plain Transformers, quick, or refused."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

import lora_ft
from lora_ft.errors import UsageError
from lora_ft.models.resolve import resolve
from lora_ft.recipe import load_recipe
from lora_ft.records import Silent
from lora_ft.training import few_shot
from tests.integration.runs import adapter, records
from tests.words import BERT, word_tokenizer

THINGS = ("ball", "train", "city", "child", "river", "letter")
SAYS = ("is red", "runs late", "sleeps well", "sings now", "was lost", "grows old")


@pytest.fixture(scope="module")
def bert():
    """Folder of the tiny BERT."""
    return resolve("builtin:tiny-bert", lambda _: None)


def classified(count, classes, seed=0):
    rng = random.Random(seed)
    return [
        {
            "text": f"{rng.choice(('the', 'my'))} {rng.choice(THINGS)} {rng.choice(('', 'very ', 'so '))}"
            f"{SAYS[i % classes]} {rng.choice(('today', 'again', 'there'))}",
            "label": f"class {i % classes}" if rng.random() < 0.9 else "class 0",  # some are wrong, as people's are
        }
        for i in range(count)
    ]


@pytest.fixture
def write(tmp_path):
    def call(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    return call


@pytest.fixture
def recipe(write):
    return {
        "model": "builtin:tiny-bert", "task": "text-classification", "method": "head",
        "data": {"train": write("train.jsonl", classified(48, 3)), "eval": write("held.jsonl", classified(20, 3, 1))},
        "train": {"few_shot": True, "dtype": "float32"},
    }  # fmt: skip


def features(folder, texts, pooled=True):
    """The pooled output, or the last hidden states, of each text alone, by plain Transformers in float32."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = [model(**tokenizer(t, return_tensors="pt")) for t in texts]
    return [(f.pooler_output if pooled else f.last_hidden_state)[0].double().numpy() for f in found]


def answers(run, write, rows, tmp_path):
    lora_ft.predict(run, write("ask.jsonl", rows), tmp_path / "answers.jsonl")
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_linear_head_is_scikit_learns_logistic_regression(recipe, bert, write, tmp_path):
    run = lora_ft.train(recipe, out=tmp_path / "run")
    (fit,) = records(run)
    train, held = read(recipe["data"]["train"]), read(recipe["data"]["eval"])
    x, y = np.stack(features(bert, [r["text"] for r in train])), [r["label"] for r in train]
    model = LogisticRegression(C=1 / (len(x) * fit["penalty"]), tol=1e-9, max_iter=10_000).fit(x, y)
    wanted = model.predict_proba(np.stack(features(bert, [r["text"] for r in held])))
    found = answers(run, write, [{"text": r["text"]} for r in held], tmp_path)
    assert np.array([[f["scores"][c] for c in model.classes_] for f in found]) == pytest.approx(wanted, abs=1e-3)
    assert wanted.min() < 0.05  # no flat answers that anything would equal
    chance = run.metrics["before"]["accuracy"]
    assert run.metrics["after"]["accuracy"] == model.score(
        np.stack(features(bert, [r["text"] for r in held])), [r["label"] for r in held]
    )
    assert run.metrics["after"]["accuracy"] > max(0.6, chance)
    assert fit["loss"] == pytest.approx(
        -np.log(model.predict_proba(x)[range(48), [int(c[-1]) for c in y]]).mean(), rel=1e-3
    )


def test_the_penalty_is_the_one_that_cross_validation_in_scikit_learn_prefers(recipe, bert, tmp_path):
    run = lora_ft.train(recipe, out=tmp_path / "run")
    train = read(recipe["data"]["train"])
    x, y = np.stack(features(bert, [r["text"] for r in train])), np.array([r["label"] for r in train])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).numpy()
    scores = {}
    for penalty in few_shot.PENALTIES:
        losses = []
        for fold in range(few_shot.FOLDS):
            held = order[fold :: few_shot.FOLDS]
            rest = np.setdiff1d(order, held)
            model = LogisticRegression(C=1 / (len(rest) * penalty), max_iter=10_000).fit(x[rest], y[rest])
            chances = model.predict_proba(x[held])
            losses += list(-np.log(chances[range(len(held)), [list(model.classes_).index(c) for c in y[held]]]))
        scores[penalty] = np.mean(losses)
    best = min(scores, key=scores.get)
    assert records(run)[0]["penalty"] == best
    assert sorted(scores.values())[1] - scores[best] > 1e-2  # no tie that rounding decides


def test_a_number_is_scikit_learns_ridge(recipe, bert, write, tmp_path):
    rng = random.Random(0)
    rows = [
        {"text": f"{'so ' * (i % 4)}good {rng.choice(THINGS)}", "label": i % 4 * 10 + rng.random()} for i in range(40)
    ]
    recipe |= {"task": "regression", "data": {"train": write("n.jsonl", rows), "eval": None}}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    penalty = records(run)[0]["penalty"]
    x, y = np.stack(features(bert, [r["text"] for r in rows])), np.array([r["label"] for r in rows])
    model = Ridge(alpha=len(x) * penalty / 2).fit(x, (y - y.mean()) / y.std())
    found = [float(a["value"] if "value" in a else a["output"]) for a in answers(run, write, rows, tmp_path)]
    assert found == pytest.approx(model.predict(x) * y.std() + y.mean(), abs=0.05)
    assert np.corrcoef(found, y)[0, 1] > 0.99


def test_words_are_classified_by_their_own_features(recipe, bert, write, tmp_path):
    names = {"anna": "PER", "bob": "PER", "paris": "LOC", "rome": "LOC"}
    rng = random.Random(0)
    lines = [[rng.choice(list(names)), "went", *["so"] * (i % 3), "to", rng.choice(list(names))] for i in range(30)]
    rows = [{"tokens": words, "tags": [names.get(w, "O") for w in words]} for words in lines]
    recipe |= {"task": "token-classification", "data": {"train": write("t.jsonl", rows), "eval": None}}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    tokenizer, x, y = AutoTokenizer.from_pretrained(bert), [], []
    for row, states in zip(rows, features(bert, [" ".join(r["tokens"]) for r in rows], pooled=False), strict=True):
        seen = set()
        for place, word in enumerate(tokenizer(row["tokens"], is_split_into_words=True).word_ids()):
            if word is not None and word not in seen:  # the first piece of each word carries its label
                seen.add(word)
                x.append(states[place])
                y.append(row["tags"][word])
    model = LogisticRegression(C=1 / (len(x) * records(run)[0]["penalty"]), tol=1e-9, max_iter=10_000).fit(x, y)
    wanted = -np.log(model.predict_proba(x)[range(len(x)), [list(model.classes_).index(t) for t in y]]).mean()
    assert records(run)[0]["loss"] == pytest.approx(wanted, rel=1e-2, abs=1e-5)
    told = answers(run, write, rows, tmp_path)
    assert [a["output"] for a in told] == [a["reference"] for a in told]


def test_a_full_set_takes_seconds_and_is_the_same_each_time(recipe, write, tmp_path):
    recipe["data"] = {
        "train": write("full.jsonl", classified(32 * 6, 6)),
        "eval": write("h.jsonl", classified(36, 6, 2)),
    }
    started = time.perf_counter()
    run = lora_ft.train(recipe, out=tmp_path / "a")
    assert time.perf_counter() - started < 20
    assert run.facts["steps"] == 1
    again = lora_ft.train({**recipe, "train": {**recipe["train"], "tokens_per_micro_batch": 64}}, out=tmp_path / "b")
    same = lora_ft.train(recipe, out=tmp_path / "c")
    first, second, other = (adapter(r.adapter) for r in (run, same, again))
    assert all(torch.equal(second[k], v) for k, v in first.items())
    assert all(torch.allclose(other[k], v, atol=1e-2) for k, v in first.items())  # other batches, other rounding
    assert run.metrics["after"] == same.metrics["after"]
    assert run.metrics["after"]["accuracy"] > 0.7
    judged = lora_ft.evaluate_run(run)[0]["after"]
    assert judged["accuracy"] == run.metrics["after"]["accuracy"]
    assert judged["loss"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-4)
    assert lora_ft.merge(run, tmp_path / "merged", dtype="float32")["max_difference"] < 1e-4


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A tiny RoBERTa with a tokenizer of words."""
    words = " ".join(dict.fromkeys(" ".join((*THINGS, *SAYS, "the my very so today again there")).split()))
    tokenizer = word_tokenizer(words, {**BERT, "bos_token": "<s>", "eos_token": "</s>"})
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3, type_vocab_size=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("roberta")
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_head_with_a_hidden_layer_on_the_first_token_is_fitted(recipe, roberta, tmp_path):
    run = lora_ft.train({**recipe, "model": str(roberta)}, out=tmp_path / "run")
    names = {k.split("classifier.")[1].split(".")[0] for k in adapter(run.adapter)}
    assert names == {"dense", "out_proj"}
    assert run.metrics["after"]["accuracy"] > run.metrics["before"]["accuracy"] + 0.2
    assert records(run)[0]["loss"] < 0.6 * np.log(3)
    assert lora_ft.evaluate_run(run)[0]["after"]["loss"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-4)


def test_the_answer_of_a_decoder_is_read_at_its_last_token(recipe, base_folder, tmp_path):
    run = lora_ft.train({**recipe, "model": str(base_folder)}, out=tmp_path / "run")
    assert records(run)[0]["loss"] < np.log(3) - 0.05
    assert lora_ft.evaluate_run(run)[0]["after"]["loss"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"type": "lora", "r": 4}}, ("method lora trains more than a head", "method=head")),
        ({"task": "masked-lm"}, ("the task masked-lm has no new head", "few_shot=false")),
        ({"task": "multiple-choice"}, ("the task multiple-choice has no new head", "few_shot=false")),
        ({"data": {"sampling": "balanced"}}, ("data.sampling: balanced changes how epochs are drawn", "class weights")),
        ({"data": "weighted"}, ("a data.train list with weights changes how", "class weights")),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_base_is_read(recipe, write, tmp_path, monkeypatch, change, said):
    what, fix = said
    if change.get("data") == "weighted":
        second = write("second.jsonl", classified(12, 3, 5))
        change = {"data": {"train": [{"path": recipe["data"]["train"], "weight": 2}, {"path": second}]}}
    rows = {
        "masked-lm": [{"text": "the ball is red"}] * 8,
        "multiple-choice": [{"question": "red is", "choices": ["a", "b"], "label": i % 2} for i in range(8)],
    }.get(change.get("task"))
    if rows:
        change = {**change, "data": {"train": write("other.jsonl", rows), "eval": None}}
    monkeypatch.setattr("lora_ft.pipeline.train_run.make_ready", lambda *_: pytest.fail("the base was read"))
    for start in (lora_ft.pipeline.dry_run, lambda r: lora_ft.pipeline.train(r, out=tmp_path / "run")):
        with pytest.raises(UsageError, match=what) as caught:
            start(load_recipe([recipe, change]))
        assert fix in caught.value.fix
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_new_part_of_the_body_is_named(recipe, roberta, tmp_path):
    config = BertConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(roberta).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="several places") as caught:
        lora_ft.train({**recipe, "model": str(tmp_path / "bert")}, out=tmp_path / "run")
    assert "pooler" in caught.value.what
    assert "is new and must train too" in caught.value.why


def test_keys_of_the_train_section_that_would_do_nothing_are_refused(recipe, tmp_path):
    recipe["train"] |= {"epochs": 7, "learning_rate": 1e-2, "early_stopping": 2, "tokens_per_micro_batch": 64}
    with pytest.raises(UsageError, match=r"train\.epochs, train\.learning_rate, train\.early_stopping would") as caught:
        lora_ft.pipeline.dry_run(load_recipe([recipe]), Silent())
    back = [s for s in caught.value.fix.split() if s.startswith("train.")]
    assert back == ["train.epochs=null", "train.learning_rate=0.0002", "train.early_stopping=null"]
    lora_ft.pipeline.dry_run(load_recipe([recipe], sets=back), Silent())


def test_a_dry_run_plans_no_steps(recipe):
    assert lora_ft.pipeline.dry_run(load_recipe([recipe]), Silent())["steps"] == 1


def test_a_model_that_does_more_after_its_head_is_refused(recipe, tmp_path, monkeypatch):
    real = BertForSequenceClassification.forward

    def doubled(*args, **named):
        found = real(*args, **named)
        found.logits = found.logits * 2
        return found

    monkeypatch.setattr(BertForSequenceClassification, "forward", doubled)
    with pytest.raises(UsageError, match="does not work on this model") as caught:
        lora_ft.train(recipe, out=tmp_path / "run")
    assert "the loss on cached features is" in caught.value.why
