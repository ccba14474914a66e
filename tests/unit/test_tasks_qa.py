"""Extractive question answering: windows, positions, the best span, SQuAD's metrics."""

import copy

import numpy as np
import pytest
import torch
from torchmetrics.functional.text import squad
from transformers import BertConfig, BertForQuestionAnswering

from lora_ft.data import encode_all
from lora_ft.errors import DataError, UsageError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from tests.words import BERT, summed, word_tokenizer

CONTEXT = "a b c d e f g h i j k l m n o p"
WORDS = CONTEXT + " who where is it"


@pytest.fixture(scope="module")
def processor():
    return word_tokenizer(WORDS, BERT, dropped="~")


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(processor),
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return BertForQuestionAnswering(config).double().eval()


def task(**options):
    return TASKS.get("question-answering").configure(options)


def row(answer: str | None = None, context: str = CONTEXT, question: str = "who is it", where: str = "f:1", **fields):
    if answer is not None:
        fields["answers"] = [{"text": answer, "start": context.index(answer)}]
    return Example({"question": question, "context": context, **fields}, where)


def encoded(example, processor, chosen=None, max_length=64, overlong="truncate"):
    return (chosen or task()).encoder(processor, EncodeOptions(max_length, overlong))(example)


def words(sample, processor):
    return processor.convert_ids_to_tokens(sample.inputs["input_ids"])


def marked(sample, processor):
    return words(sample, processor)[sample.inputs["start_positions"] : sample.inputs["end_positions"] + 1]


def test_long_context_loses_nothing_between_windows(processor):
    found = encoded(row("j k"), processor, task(doc_stride=2), max_length=11)  # room for 5 words of context
    assert found.outcome == "context read in several windows"
    contexts = [words(s, processor)[5:-1] for s in found.samples]
    assert contexts[0] == list("abcde")
    assert contexts[1] == list("defgh")
    assert {w for c in contexts for w in c} == set(CONTEXT.split())
    assert all(words(s, processor)[:5] == ["[CLS]", "who", "is", "it", "[SEP]"] for s in found.samples)
    pointing = [marked(s, processor) for s in found.samples]
    assert [p for p in pointing if p != ["[CLS]"]] == [["j", "k"]] * sum({"j", "k"} <= set(c) for c in contexts)
    assert any("j" in c and p == ["[CLS]"] for c, p in zip(contexts, pointing, strict=True)) == any(
        "j" in c and "k" not in c for c in contexts
    )


def test_windows_share_at_most_half_so_that_a_short_max_length_still_moves_on(processor):
    found = encoded(row("p"), processor, max_length=10)  # doc_stride 128 is more than a window holds
    assert [words(s, processor)[5:-1] for s in found.samples][:2] == [list("abcd"), list("cdef")]


@pytest.mark.parametrize(
    ("overlong", "outcome"), [("drop", "dropped: longer than max_length"), ("error", "over max_length")]
)
def test_windows_are_not_made_where_long_rows_are_unwanted(processor, overlong, outcome):
    found = encoded(row("b"), processor, max_length=12, overlong=overlong)
    assert (found.samples, found.outcome) == ((), outcome)
    assert encoded(row("b"), processor, overlong=overlong).samples


def test_no_answer_points_at_cls_in_every_window(processor):
    found = encoded(row(answers=[]), processor, max_length=12)
    assert len(found.samples) > 1
    assert {(s.inputs["start_positions"], s.inputs["end_positions"], s.labelled) for s in found.samples} == {(0, 0, 1)}


def test_answer_that_no_window_holds_is_not_taught_as_no_answer(processor):
    example = row("a b c d e f g h")
    found = encoded(example, processor, task().learn([example], []), max_length=12)
    assert found.outcome == "dropped: no window holds the whole answer"
    assert all(s.labelled == 0 and "start_positions" not in s.inputs for s in found.samples)


def test_answer_that_no_window_holds_counts_as_wrong_and_has_no_loss(model, processor):
    lost, held = row("a b c d e f g h", where="1"), row("b", where="2")
    chosen = task().learn([row("c", where="3")], [lost, held])
    samples, report = encode_all(
        [lost, held], chosen.encoder(processor, EncodeOptions(12, "truncate")), source="f", format_name="squad",
        max_length=12,
    )  # fmt: skip
    assert report.outcomes["judged without a loss: no window holds the whole answer"] == 1
    assert {s.where for s in samples} == {"1", "2"}
    assert chosen.show(samples[0], processor).endswith("[[no whole answer here]]")
    outputs = [logits(s, {"b": 5.0}, {"b": 5.0}, processor) for s in samples]
    judged = chosen.measure(samples, outputs)
    assert judged.right == [False, True]
    assert judged.metrics["exact_match"] == 0.5
    alone = [s for s in samples if s.where == "2"]
    every, rest = (chosen.loss(model, chosen.collate(part, processor)) for part in (samples, alone))
    assert every.count == rest.count == len(alone) < len(samples)
    assert torch.isclose(every.total, rest.total, rtol=1e-9)


def test_answer_lost_to_the_tokenizer_is_a_bad_row(processor):
    with pytest.raises(ValueError, match=r"answer '~' at character 2 is lost"):
        encoded(row("~", context="a ~ b"), processor)


def test_question_that_fills_max_length_is_a_bad_row(processor):
    with pytest.raises(ValueError, match="question takes 6 tokens, so max_length 6 leaves no room"):
        encoded(row("b"), processor, max_length=6)


def test_part_of_a_word_is_marked_by_the_whole_token(processor):
    (sample,) = encoded(row("her", context="is where it"), processor).samples
    assert marked(sample, processor) == ["where"]
    assert task().show(sample, processor).endswith("[SEP] is [[where]] it [SEP]")


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="needs a fast tokenizer, got Slow"):
        task().check_processor(Slow())


def test_loss_is_the_models_own(model, processor):
    chosen = task()
    for example in (row("c d"), row(answers=[])):
        (sample,) = encoded(example, processor).samples
        batch = chosen.collate([sample], processor)
        found = chosen.loss(model, batch)
        assert found.count == 1
        assert torch.isclose(found.total, model(**batch).loss, rtol=1e-9)
    same = [encoded(row(w), processor).samples[0] for w in "adg"]
    batch = chosen.collate(same, processor)
    assert torch.isclose(chosen.loss(model, batch).total, model(**batch).loss * 3, rtol=1e-9)


def test_micro_batches_do_not_change_the_gradient(model, processor):
    rows = [row(w, context=" ".join(CONTEXT.split()[: 4 + 2 * i])) for i, w in enumerate("abcdabcd")]
    samples = [s for r in rows for s in encoded(r, processor, max_length=14).samples]
    assert len({s.length for s in samples}) > 1
    whole = summed(task(), copy.deepcopy(model), samples, processor, len(samples))
    parts = summed(task(), copy.deepcopy(model), samples, processor, 1)
    assert whole[:2] == pytest.approx(parts[:2], rel=1e-9)
    assert torch.allclose(whole[2], parts[2], rtol=1e-8, atol=1e-12)


def logits(sample, start: dict[str, float], end: dict[str, float], processor):
    """Outputs with these logits at these words, 0 elsewhere, and padding behind."""
    tokens = words(sample, processor)
    rows = []
    for given in (start, end):
        values = [given.get(t, 0.0) for t in tokens] + [float("-inf")] * 3
        rows.append(torch.tensor(values))
    return {"start_logits": rows[0], "end_logits": rows[1]}


def decoded(chosen, example, outputs, processor, max_length=64):
    samples = encoded(example, processor, chosen, max_length).samples
    given = [logits(s, *outputs, processor) for s in samples]
    return next(chosen.decode([example], [samples], [given], processor))


def test_best_span_of_all_windows_is_the_answer(processor):
    chosen = task(doc_stride=2)
    example = row("j k", where="f:9")
    found = decoded(chosen, example, ({"j": 5.0, "b": 4.0}, {"k": 5.0, "a": 9.0}), processor, max_length=11)
    assert (found.output, found.reference, found.where) == ("j k", "j k", "f:9")
    assert found.details["start"] == CONTEXT.index("j")
    assert 0.5 < found.details["score"] <= 1


def test_answer_never_ends_before_it_starts_nor_grows_too_long_nor_leaves_the_context(processor):
    best = ({"h": 5.0, "who": 50.0}, {"a": 6.0, "p": 4.0, "i": 3.0, "[SEP]": 50.0})
    assert decoded(task(max_answer_length=3), row("b"), best, processor).output == "h i"
    assert decoded(task(max_answer_length=9), row("b"), best, processor).output == "h i j k l m n o p"


def test_no_answer_wins_only_by_the_threshold_and_only_where_rows_lack_answers(processor):
    best = ({"[CLS]": 4.0, "c": 3.0}, {"[CLS]": 4.0, "d": 3.0})
    learnt = task().learn([row("a"), row(answers=[])], [])
    assert learnt.facts() == {"has_no_answers": True}
    assert task().learn([row("a")], [row("b")]).facts() == {"has_no_answers": False}
    assert decoded(task(), row("c d"), best, processor).output == "c d"
    silent = decoded(task().recall({"has_no_answers": True}), row(answers=[]), best, processor)
    assert (silent.output, silent.reference, silent.details["start"]) == ("", "", None)
    slower = task(null_score_diff_threshold=2.5).recall({"has_no_answers": True})
    assert decoded(slower, row("c d"), best, processor).output == "c d"


def test_metrics_are_those_of_squad(processor):
    chosen = task(doc_stride=2).learn([row(answers=[])], [])
    rows = [
        row("j k", where="1"), row("c d e", where="2"), row(answers=[], where="3"), row(answers=[], where="4"),
    ]  # fmt: skip
    wanted = [("j", "k"), ("d", "e"), ("[CLS]", "[CLS]"), ("f", "f")]
    samples, outputs = [], []
    for example, (first, last) in zip(rows, wanted, strict=True):
        mine = encoded(example, processor, chosen, max_length=11).samples
        samples += mine
        outputs += [logits(s, {first: 5.0}, {last: 5.0}, processor) for s in mine]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    assert [samples[i].where for i in order] != [s.where for s in samples]
    judged = chosen.measure(samples, outputs)
    oracle = squad(
        [{"id": str(i + 1), "prediction_text": t} for i, t in enumerate(["j k", "d e", "", "f"])],
        [
            {"id": e.where, "answers": {"text": [a["text"] for a in e.fields["answers"]] or [""], "answer_start": [0]}}
            for e in rows
        ],
    )
    assert judged.right == [True, False, True, False]
    assert judged.metrics == pytest.approx({k: float(v) / 100 for k, v in oracle.items()})
    assert judged.metrics["f1"] > judged.metrics["exact_match"] == 0.5
    again = chosen.measure([samples[i] for i in order], [outputs[i] for i in order])
    assert again.metrics == pytest.approx(judged.metrics)


def test_prediction_needs_no_answers_and_keeps_the_order(model, processor):
    rows = [row(where=str(i), context=CONTEXT[: 31 - 4 * i]) for i in range(4)]
    options = PredictOptions(0, 3, EncodeOptions(11, "truncate"))
    found = list(task().predict(model, processor, rows, options))
    assert [p.where for p in found] == ["0", "1", "2", "3"]
    for p, example in zip(found, rows, strict=True):
        start = p.details["start"]
        assert p.output
        assert example.fields["context"][start : start + len(p.output)] == p.output
        assert p.reference is None
    with pytest.raises(DataError, match="leaves no room"):
        list(task().predict(model, processor, [row(question="who " * 20)], options))


def test_probes_and_outputs_hold_no_labels_and_samples_stay_small(model, processor):
    chosen = task()
    samples = encoded(row("c"), processor, max_length=12).samples
    probes = chosen.probes(samples, processor)
    assert all(set(p) == {"input_ids", "attention_mask", "token_type_ids"} for p in probes)
    assert chosen.outputs(model, probes[0]).shape == (1, samples[0].length, 2)
    assert all(isinstance(s.inputs["offsets"], np.ndarray) and s.inputs["offsets"].dtype == np.int32 for s in samples)


def test_unknown_option_names_the_nearest():
    with pytest.raises(UsageError, match="doc_strid: question-answering has no such option; did you mean 'doc_stride'"):
        task(doc_strid=3)
