"""Token classification: words to tokens, tags to spans, and back."""

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional
from transformers import ByT5Tokenizer

from lora_ft.errors import DataError, UsageError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.tasks._words import WordTokenizer
from lora_ft.tasks.token_classification import TokenClassification
from tests.tiny import tiny_tokenizer
from tests.tiny_readers import loss_and_gradient, tiny_model, word_piece

OPTIONS = EncodeOptions(max_length=32, overlong="truncate")
SENTENCES = [
    ("Anna lives in New York", "B-PER O O B-LOC I-LOC"),
    ("Bo was in Paris .", "B-PER O O B-LOC O"),
    ("the film was good", "O O O O"),
    ("New York", "B-LOC I-LOC"),
    ("Zara Zed lives", "B-PER I-PER O"),
    ("in Paris !", "O B-LOC O"),
    ("bad", "O"),
    ("Anna , Bo", "B-PER O B-PER"),
]


def rows(sentences, plain=None):
    return [
        Example({"tokens": w.split(), "tags": [plain or t for t in tags.split()]}, f"r.conll:{i}")
        for i, (w, tags) in enumerate(sentences, 1)
    ]


ROWS = rows(SENTENCES)


def learnt(examples=ROWS, **options):
    return TokenClassification().configure(options).learn(examples, [])


def encoded(task, examples, processor, options=OPTIONS):
    encode = task.encoder(processor, options)
    return [s for e in examples for s in encode(e).samples]


def made(kind="bert", **options):
    """(task, model, samples, tokenizer)"""
    task = learnt(**options)
    processor = word_piece() if kind == "bert" else tiny_tokenizer(None)
    limit = replace(OPTIONS, max_length=48)
    model = tiny_model(kind, "token", **task.model_arguments())
    return task, model, encoded(task, ROWS, processor, limit), processor


def test_only_the_first_token_of_a_word_carries_its_tag():
    task, processor = learnt(), word_piece()
    (sample,) = encoded(task, ROWS[4:5], processor)
    assert processor.convert_ids_to_tokens(sample.inputs["input_ids"]) == [
        "[CLS]", "z", "##a", "##r", "##a", "z", "##e", "##d", "lives", "[SEP]",
    ]  # fmt: skip
    b, i, o = (task.labels.index(t) for t in ("B-PER", "I-PER", "O"))
    assert sample.inputs["labels"] == [-100, b, -100, -100, -100, i, -100, -100, o, -100]
    assert sample.labelled == 3
    assert task.show(sample, processor) == "zara[[B-PER]] zed[[I-PER]] lives"
    (last,) = encoded(task, ROWS[3:4], processor)
    assert task.show(last, processor) == "new[[B-LOC]] york[[I-LOC]]"
    (every,) = encoded(learnt(label_all_tokens=True), ROWS[4:5], processor)
    assert every.inputs["labels"] == [-100, b, i, i, i, i, i, i, o, -100]


def test_words_are_tokenised_as_transformers_tokenises_split_words():
    processor = word_piece()
    tokenizer = WordTokenizer(processor)
    for example in [*ROWS, Example({"tokens": ["don't", "goodly,", "\x00", "x.y"]}, "r:1")]:
        words = example.fields["tokens"]
        (piece,) = tokenizer.pieces(words, 64)
        want = processor(words, is_split_into_words=True)
        assert piece.ids == want["input_ids"]
        assert piece.types == want["token_type_ids"]
        ids = want.word_ids()
        assert piece.first == [ids.index(i) if i in ids else -1 for i in range(len(words))]


def test_byte_level_words_keep_the_space_before_them():
    processor = tiny_tokenizer(None)
    (piece,) = WordTokenizer(processor).pieces(["new", "york"], 64)
    assert processor.decode(piece.ids) == " new york"
    assert piece.first == [0, 4]


def test_a_tokenizer_without_offsets_serves_as_well():
    processor = ByT5Tokenizer()
    assert not processor.is_fast
    (piece,) = WordTokenizer(processor).pieces(["new", "york"], 64)
    assert processor.decode(piece.ids) == " new york</s>"
    assert (piece.first, piece.counts, piece.types) == ([0, 4], [4, 5], [])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_loss_is_the_models_own_however_the_step_is_cut(kind):
    task, model, samples, processor = made(kind)
    batch = task.collate(samples, processor)
    for i, s in enumerate(samples):
        assert batch["labels"][i].tolist() == [*s.inputs["labels"], *[-100] * (batch["labels"].shape[1] - s.length)]
    own = float(model(**batch).loss.detach())
    whole, gradient = loss_and_gradient(task, model, samples, processor, 8)
    single, same = loss_and_gradient(task, model, samples, processor, 1)
    assert whole == pytest.approx(own, abs=1e-6)
    assert single == pytest.approx(own, abs=1e-6)
    torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-6)


def test_weights_and_smoothing_are_those_of_torch():
    task, model, samples, processor = made(class_weights="balanced", label_smoothing_factor=0.1)
    counts = {t: sum(e.fields["tags"].count(t) for e in ROWS) for t in task.labels}
    assert task.weights == pytest.approx([sum(counts.values()) / 5 / counts[t] for t in task.labels])
    batch = task.collate(samples, processor)
    logits = task.answer(model, batch).logits.flatten(0, 1)
    weight = torch.tensor(task.weights)
    want = functional.cross_entropy(logits, batch["labels"].flatten(), weight=weight, label_smoothing=0.1)
    for size in (8, 3):
        assert loss_and_gradient(task, model, samples, processor, size)[0] == pytest.approx(
            float(want.detach()), abs=1e-6
        )


def test_virtual_tokens_of_a_prompt_method_shift_no_label():
    task, model, samples, processor = made()
    batch = task.collate(samples, processor)
    answer = task.answer(model, batch)
    want = task.loss(model, batch)
    longer = torch.cat([torch.full((len(samples), 7, 5), 9.0), answer.logits], 1)
    prompted = replace_answer(task, type("Answer", (), {"logits": longer})())
    found = prompted.loss(model, batch)
    assert float(found.total.detach()) == pytest.approx(float(want.total.detach()))
    assert torch.equal(found.outputs["tags"], want.outputs["tags"])


def replace_answer(task, answer):
    class Fixed(type(task)):
        def answer(self, model, batch):
            return answer

    return Fixed(**{f.name: getattr(task, f.name) for f in fields(task)})


def outputs_of(task, samples, tags_by_row):
    """What the model would have to keep to mean these tags."""
    rest = {w: list(tags) for w, tags in tags_by_row.items()}
    found = []
    for s in samples:
        tags = torch.full((s.length,), task.labels.index("B-LOC") if "B-LOC" in task.labels else 0)
        for position in s.inputs["words"]:
            tag = rest[s.where].pop(0)
            if position >= 0:
                tags[position] = task.labels.index(tag)
        found.append({"tags": tags})
    return found


def test_metrics_of_spans_by_hand():
    task, processor = learnt(), word_piece()
    samples = encoded(task, ROWS[:3], processor)
    # Given 4 spans: Anna and Bo right, "York" with a wrong start, "film" out of nothing; Paris is missed.
    given = ["B-PER O O O B-LOC", "B-PER O O O O", "O B-LOC O O"]
    outputs = outputs_of(task, samples, {e.where: g.split() for e, g in zip(ROWS, given, strict=False)})
    found = task.measure(samples, outputs)
    want = {"accuracy": 10 / 14, "span_precision": 2 / 4, "span_recall": 2 / 4, "span_f1": 0.5}
    assert found.metrics == pytest.approx(want)
    assert found.right == [False, False, False]
    table = found.tables["confusion_matrix"]
    assert table["labels"] == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    assert table["rows"] == [[0, 0, 0, 0, 2], [0, 2, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 8]]


def test_a_set_without_a_span_has_a_verdict():
    task = learnt()
    samples = encoded(task, ROWS[2:3], word_piece())
    found = task.measure(samples, outputs_of(task, samples, {"r.conll:3": ["O"] * 4}))
    assert found.metrics == {"accuracy": 1.0, "span_precision": 0.0, "span_recall": 0.0, "span_f1": 0.0}
    assert found.right == [True]


def test_plain_tags_are_judged_by_word():
    speech = [("the film was good", "DET NOUN VERB ADJ"), ("good film", "ADJ NOUN")]
    task = learnt(rows(speech))
    assert (task.scheme, task.filler) == ("plain", "ADJ")
    samples = encoded(task, rows(speech), word_piece())
    given = {"r.conll:1": ["DET", "NOUN", "VERB", "ADJ"], "r.conll:2": ["ADJ", "ADJ"]}
    found = task.measure(samples, outputs_of(task, samples, given))
    assert found.right == [True, False]
    assert found.metrics["accuracy"] == pytest.approx(5 / 6)
    assert found.metrics["f1_macro"] == pytest.approx((4 / 5 + 1 + 2 / 3 + 1) / 4)
    with pytest.raises(DataError, match=r"task.scheme is spans, but the tag 'ADJ' marks none"):
        learnt(rows(speech), scheme="spans")
    assert "spans" not in next(iter(task.predict(
        tiny_model("bert", "token", **task.model_arguments()), word_piece(), rows(speech), PredictOptions(1, 2, OPTIONS)
    ))).details  # fmt: skip


def test_a_long_row_is_cut_between_words_and_judged_whole():
    task, processor = learnt(), word_piece()
    long = rows([("Zara Zed was in New York . " * 3, "B-PER I-PER O O B-LOC I-LOC O " * 3)])
    options = EncodeOptions(max_length=14, overlong="truncate")
    found = task.encoder(processor, options)(long[0])
    assert found.outcome == "cut into pieces"
    assert max(s.length for s in found.samples) <= 14
    assert min(s.length for s in found.samples) >= 8  # no crumb at the end
    assert sum(s.labelled for s in found.samples) == 21
    assert {s.where for s in found.samples} == {"r.conll:1"}
    outputs = outputs_of(task, found.samples, {"r.conll:1": long[0].fields["tags"]})
    assert task.measure(found.samples, outputs).right == [True]
    for overlong, outcome in [("drop", "dropped: longer than max_length"), ("error", "over max_length")]:
        assert task.encoder(processor, replace(options, overlong=overlong))(long[0]).outcome == outcome
    model = tiny_model("bert", "token", **task.model_arguments())
    (p,) = task.predict(model, processor, long, PredictOptions(1, 4, options))
    assert len(p.details["tags"]) == len(p.output.split()) == 21
    assert not p.cut


def test_a_word_longer_than_a_piece_keeps_its_tag():
    task, processor = learnt(), word_piece()
    row = Example({"tokens": ["in", "z" * 40, "Paris"], "tags": ["O", "B-PER", "B-LOC"]}, "r:1")
    found = task.encoder(processor, replace(OPTIONS, max_length=10))(row)
    assert found.outcome == "truncated: a word is longer than max_length"
    assert max(s.length for s in found.samples) == 10
    assert sum(s.labelled for s in found.samples) == 3
    with pytest.raises(ValueError, match="max_length 2 has no room for a word"):
        task.encoder(processor, replace(OPTIONS, max_length=2))(row)


def test_predictions_are_the_models_best_tags_with_their_spans():
    task, model, samples, processor = made()
    found = list(task.predict(model, processor, ROWS, PredictOptions(1, 3, OPTIONS)))
    assert [p.reference for p in found] == [t for _, t in SENTENCES]
    assert [p.input for p in found] == [w for w, _ in SENTENCES]
    for p, s in zip(found, samples, strict=True):
        best = model(input_ids=torch.tensor([s.inputs["input_ids"]])).logits[0].argmax(-1).tolist()
        assert p.details["tags"] == [model.config.id2label[best[i]] for i in s.inputs["words"]]
        assert p.output == " ".join(p.details["tags"])
        for span in p.details["spans"]:
            assert span["text"] == " ".join(p.details["tokens"][span["start"] : span["end"]])
            assert p.details["tags"][span["start"]].endswith(span["type"])
    assert sum(len(p.details["spans"]) for p in found) > 2


def test_words_without_a_token_have_no_label_and_are_outside():
    task, model, _, processor = made()
    row = Example({"tokens": ["Anna", "", "\x00", "lives"], "tags": ["B-PER", "O", "B-LOC", "O"]}, "r:1")
    (sample,) = encoded(task, [row], processor)
    assert sample.inputs["words"] == [1, -1, -1, 2]
    assert sample.labelled == 2
    found = task.measure([sample], outputs_of(task, [sample], {"r:1": ["B-PER", "O", "O", "O"]}))
    assert found.metrics["accuracy"] == 3 / 4
    empty = Example({"tokens": ["", "\x00"]}, "r:2")
    predicted = list(task.predict(model, processor, [row, empty], PredictOptions(1, 2, OPTIONS)))
    assert predicted[0].details["tags"][1:3] == ["O", "O"]
    assert (predicted[1].output, predicted[1].reference) == ("O O", None)


def test_rows_that_are_wrong_are_named():
    for wrong, message in [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words but 1 tags"),
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": ["a"]}, "no tags"),
        ({"tokens": ["a"], "tags": [None]}, "no label"),
        ({"tokens": [1], "tags": ["O"]}, "words must be text, got 1"),
    ]:
        with pytest.raises(DataError, match=message) as e:
            learnt([*ROWS, Example(wrong, "r.conll:99")])
        assert e.value.where == "r.conll:99"
    with pytest.raises(DataError, match="'B-ORG' of a held-out row is in no training row; did you mean 'B-PER'") as e:
        TokenClassification().configure({}).learn(ROWS, rows([("Bo", "B-ORG")]))
    assert e.value.where == "r.conll:1"
    with pytest.raises(DataError, match="only the label 'O'"):
        learnt(rows(SENTENCES, plain="O"))
    with pytest.raises(UsageError, match="did you mean 'label_all_tokens'"):
        learnt(label_all_token=True)


def test_a_finished_run_knows_its_tags_again():
    task = learnt(class_weights="balanced")
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in task.facts().items()}
    assert TokenClassification().configure({"class_weights": "balanced"}).recall(facts) == task
