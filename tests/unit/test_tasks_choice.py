"""Multiple choice: rows with different numbers of choices, and what is cut of an over-long one."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForMultipleChoice

from lora_ft.errors import DataError, UsageError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from tests.words import BERT, summed, word_tokenizer

TASK = TASKS.get("multiple-choice")
WORDS = "what is it a b c d e f g h"


@pytest.fixture(scope="module")
def processor():
    return word_tokenizer(WORDS, BERT)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(processor),
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return BertForMultipleChoice(config).double().eval()


def row(choices, label=None, question="what is it", where="f:1"):
    fields = {"question": question, "choices": choices.split("/")}
    return Example(fields if label is None else {**fields, "label": label}, where)


def encoded(example, processor, max_length=64, overlong="truncate"):
    return TASK.encoder(processor, EncodeOptions(max_length, overlong))(example)


def sample(*args, processor, **more):
    return encoded(row(*args, **more), processor).samples[0]


def test_each_choice_is_paired_with_the_question(processor):
    made = sample("a/b c/d", 1, processor=processor)
    texts = [processor.convert_ids_to_tokens(ids) for ids in made.inputs["input_ids"]]
    assert texts[1] == ["[CLS]", "what", "is", "it", "[SEP]", "b", "c", "[SEP]"]
    assert made.inputs["token_type_ids"][1] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (made.length, made.labelled, made.where) == (24, 1, "f:1")
    assert TASK.show(made, processor).splitlines()[1] == "[[[CLS] what is it [SEP] b c [SEP]]]"
    assert TASK.show(made, processor).count("[[[") == 1


def test_batch_gives_back_what_was_encoded(processor):
    samples = [sample("a/b c/d", 1, processor=processor), sample("e/f", 0, processor=processor)]
    batch = TASK.collate(samples, processor)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (2, 3, 8), "attention_mask": (2, 3, 8), "token_type_ids": (2, 3, 8), "labels": (2,),
    }  # fmt: skip
    for i, s in enumerate(samples):
        for name in ("input_ids", "token_type_ids"):
            rows = [
                v[m.bool()].tolist() for v, m in zip(batch[name][i], batch["attention_mask"][i], strict=True) if m.any()
            ]
            assert rows == s.inputs[name]


def test_loss_is_the_models_own(model, processor):
    samples = [sample("a/b c/d", i, processor=processor) for i in (0, 1, 2)]
    batch = TASK.collate(samples, processor)
    found = TASK.loss(model, batch)
    assert found.count == 3
    assert torch.isclose(found.total, model(**batch).loss * 3, rtol=1e-9)
    assert torch.allclose(found.outputs["logits"], model(**batch).logits)


def test_rows_with_fewer_choices_learn_as_if_alone(model, processor):
    samples = [sample("/".join("abcdefgh"[: 2 + i % 4]), i % 2, processor=processor) for i in range(8)]
    whole = summed(TASK, copy.deepcopy(model), samples, processor, 8)
    parts = summed(TASK, copy.deepcopy(model), samples, processor, 1)
    assert whole[:2] == pytest.approx(parts[:2], rel=1e-9)
    assert torch.isfinite(whole[2]).all()
    assert torch.allclose(whole[2], parts[2], rtol=1e-8, atol=1e-12)


def test_only_the_question_is_cut(processor):
    found = encoded(row("a/b c d e", 1), processor, max_length=8)
    assert found.outcome == "truncated"
    texts = [processor.convert_ids_to_tokens(ids) for ids in found.samples[0].inputs["input_ids"]]
    assert texts[1] == ["[CLS]", "what", "[SEP]", "b", "c", "d", "e", "[SEP]"]
    assert texts[0] == ["[CLS]", "what", "is", "it", "[SEP]", "a", "[SEP]"]


def test_attention_always_has_a_token_to_look_at(model, processor):
    """Over nothing, some attention kernels give NaN."""
    seen = []
    handle = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["attention_mask"]), with_kwargs=True)
    try:
        batch = TASK.collate(
            [sample("a/b/c", 1, processor=processor), sample("d/e", 0, processor=processor)], processor
        )
        TASK.loss(model, batch)
    finally:
        handle.remove()
    assert seen[0].any(-1).all()
    assert not batch["attention_mask"].any(-1).all()


@pytest.mark.parametrize(
    ("overlong", "outcome"), [("drop", "dropped: longer than max_length"), ("error", "over max_length")]
)
def test_long_rows_follow_the_recipe(processor, overlong, outcome):
    assert encoded(row("a/b c d", 1), processor, 8, overlong).outcome == outcome
    assert encoded(row("a/b c d", 1), processor, 9, overlong).outcome == ""


def test_choice_that_leaves_no_room_for_the_question_is_dropped(processor):
    assert encoded(row("a/b c d", 1), processor, 6) == encoded(row("a/b c d", 1), processor, 6, "drop")
    assert encoded(row("a/b c d", 1), processor, 7).outcome == "truncated"


def test_label_of_no_choice_is_a_bad_row(processor):
    with pytest.raises(ValueError, match="label 2 is no choice: there are 2, counted from 0"):
        encoded(row("a/b", 2), processor)
    with pytest.raises(ValueError, match="label -1 is no choice"):
        encoded(row("a/b", -1), processor)


def test_highest_score_is_the_answer_and_padding_never_is(processor):
    rows = [row("a/b c/d", 1), row("e/f", 0), row("g/h")]
    samples = [encoded(r, processor).samples for r in rows]
    scores = [[0.0, 2.0, 1.0], [1.0, 3.0, float("-inf")], [1.0, 0.0, 99.0]]
    outputs = [{"logits": torch.tensor(s)} for s in scores]
    found = list(TASK.decode(rows, samples, [[o] for o in outputs], processor))
    assert [(p.output, p.reference) for p in found] == [("b c", "b c"), ("f", "e"), ("g", None)]
    assert found[0].details["scores"] == pytest.approx(torch.tensor(scores[0]).softmax(0).tolist(), abs=1e-6)
    assert [len(p.details["scores"]) for p in found] == [3, 2, 2]
    judged = TASK.measure([samples[0][0], samples[1][0]], outputs[:2])
    assert judged.right == [True, False]
    assert judged.metrics == {"accuracy": 0.5}


def test_prediction_agrees_with_the_model_in_mixed_batches(model, processor):
    rows = [row("/".join("abcdefgh"[: 2 + i % 4]), where=str(i)) for i in range(6)]
    found = list(TASK.predict(model, processor, rows, PredictOptions(0, 4, EncodeOptions(64, "truncate"))))
    assert [p.where for p in found] == [str(i) for i in range(6)]
    for p, example in zip(found, rows, strict=True):
        pairs = processor([example.fields["question"]] * len(example.fields["choices"]), example.fields["choices"])
        alone = model(**{k: torch.tensor([v]) for k, v in pairs.items()}).logits[0].softmax(0)
        assert p.details["scores"] == pytest.approx(alone.tolist(), abs=1e-5)
        assert p.output == example.fields["choices"][int(alone.argmax())]
    with pytest.raises(DataError, match="longer than max_length"):
        list(TASK.predict(model, processor, rows, PredictOptions(0, 4, EncodeOptions(4, "truncate"))))


def test_lora_without_a_peft_task_type_trains_body_and_head(model, processor):
    assert TASK.peft_task_type is None
    config = LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    samples = [sample("a/b/c", 1, processor=processor), sample("d/e", 0, processor=processor)]
    TASK.loss(adapted, TASK.collate(samples, processor)).total.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in grads)
    assert any("lora_A" in n for n in grads)
    assert all(
        g is not None and bool(g.isfinite().all()) and bool(g.any()) for n, g in grads.items() if "bias" not in n
    )


def test_tokenizer_without_padding_is_refused():
    with pytest.raises(UsageError, match="no padding token"):
        TASK.check_processor(word_tokenizer("a", {k: v for k, v in BERT.items() if k != "pad_token"}))
