"""Masked tokens: masks that nothing but the sample and the epoch decide, the model's own loss, a head that is cheap."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    pipeline,
)

from lora_ft.errors import DataError, UsageError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from lora_ft_adapters import AdapterError
from lora_ft_adapters.fast.masked import body_of, masked_loss
from lora_ft_adapters.fast.verify import verify
from tests.tiny import tiny_tokenizer
from tests.tiny_readers import word_piece
from tests.words import BERT, summed, word_tokenizer

WORDS = "the cat sat on a mat and dog ran to big red house while rain fell all night long"
PROCESSOR = word_tokenizer(WORDS, {**BERT, "mask_token": "[MASK]"})
TASK = TASKS.get("masked-lm")
OPTIONS = EncodeOptions(max_length=16, overlong="truncate")
ROWS = [Example({"text": " ".join(WORDS.split()[i : i + 4 + i])}, f"r.txt:{i + 1}") for i in range(8)]
SMALL = {"vocab_size": len(PROCESSOR), "num_hidden_layers": 2, "pad_token_id": 1}
SIZE = {**SMALL, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
CONFIGS = {
    "bert": BertConfig(**SIZE),
    "roberta": RobertaConfig(**SIZE),
    "distilbert": DistilBertConfig(
        vocab_size=len(PROCESSOR), dim=16, n_heads=2, n_layers=2, hidden_dim=32, pad_token_id=1
    ),
    "modernbert": ModernBertConfig(**SIZE, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
}


def model(kind="bert"):
    torch.manual_seed(0)
    made = AutoModelForMaskedLM.from_config(CONFIGS[kind], attn_implementation="sdpa").eval()
    for name, p in made.named_parameters():  # so that the answers differ from position to position
        if p.dim() == 2 and "embed" in name:
            p.data.normal_(std=0.5)
    return made


def encoded(rows=ROWS, options=OPTIONS, processor=PROCESSOR, **task_options):
    encode = TASK.configure(task_options).encoder(processor, options)
    return [s for e in rows for s in encode(e).samples]


SAMPLES = encoded()


def test_long_text_becomes_pieces_each_between_the_special_tokens():
    text = " ".join(WORDS.split() * 2)
    encode = TASK.encoder(PROCESSOR, OPTIONS)
    found = encode(Example({"text": text}, "r.txt:1"))
    assert found.outcome == "cut into pieces"
    parts = [PROCESSOR.convert_ids_to_tokens(s.inputs["input_ids"]) for s in found.samples]
    assert all((p[0], p[-1]) == ("[CLS]", "[SEP]") and len(p) <= 16 for p in parts)
    assert [w for p in parts for w in p[1:-1]] == text.split()
    assert [s.length for s in found.samples] == [16, 16, 12]


def test_a_last_piece_of_one_token_is_left_out_but_never_a_blank():
    text = " ".join(WORDS.split()[:14])
    assert len(encoded([Example({"text": f"{text} cat"}, "r:1")])) == 1
    assert len(encoded([Example({"text": f"{text} [MASK]"}, "r:1")])) == 2


@pytest.mark.parametrize(("overlong", "said"), [("drop", "dropped"), ("error", "over max_length")])
def test_long_text_is_dropped_or_refused_when_asked(overlong, said):
    found = TASK.encoder(PROCESSOR, EncodeOptions(8, overlong))(Example({"text": WORDS}, "r:1"))
    assert not found.samples
    assert found.outcome.startswith(said)


def test_masks_are_the_samples_own_and_another_each_epoch():
    alone = [TASK.collate([s], PROCESSOR, draw=3) for s in SAMPLES]
    torch.manual_seed(99)
    together = TASK.collate(SAMPLES[::-1], PROCESSOR, draw=3)
    for one, s, ids, labels in zip(
        alone, SAMPLES, together["input_ids"].flip(0), together["labels"].flip(0), strict=True
    ):
        assert torch.equal(one["input_ids"][0], ids[: s.length])
        assert torch.equal(one["labels"][0], labels[: s.length])
    judged = [TASK.collate(SAMPLES, PROCESSOR)["labels"] for _ in range(2)]
    assert torch.equal(*judged)
    assert not torch.equal(judged[0], TASK.collate(SAMPLES, PROCESSOR, draw=4)["labels"])


def test_masking_is_berts():
    """Over many draws: 15 % chosen, of these 80 % masked, 10 % random, 10 % kept; never a special token or padding."""
    (sample,) = encoded([Example({"text": " ".join(WORDS.split() * 20)}, "r:1")], EncodeOptions(512, "truncate"))
    original = torch.tensor(sample.inputs["input_ids"])
    chosen = masked = kept = 0
    for draw in range(1, 60):
        batch = TASK.collate([sample, SAMPLES[0]], PROCESSOR, draw)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        at = labels != -100
        assert torch.equal(labels[at], original[at])
        assert torch.equal(ids[~at], original[~at])
        assert not at[[0, -1]].any()
        assert (batch["labels"][1, SAMPLES[0].length - 1 :] == -100).all()
        chosen += int(at.sum())
        masked += int((ids[at] == PROCESSOR.mask_token_id).sum())
        kept += int((ids[at] == original[at]).sum())
    assert chosen / (59 * 380) == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.03)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / len(PROCESSOR), abs=0.02)


def test_a_short_text_has_at_least_one_mask():
    (sample,) = encoded([Example({"text": "cat"}, "r:1")])
    for draw in range(20):
        labels = TASK.collate([sample], PROCESSOR, draw)["labels"]
        assert (labels != -100).nonzero().tolist() == [[0, 1]]


def test_the_pieces_of_a_word_are_masked_together():
    processor = word_piece()
    processor.add_special_tokens({"mask_token": "[MASK]"})
    task = TASK.configure({"whole_word_mask": True})
    assert task.check_processor(processor) == []
    (sample,) = task.encoder(processor, OPTIONS)(Example({"text": "dog paris abc"}, "r:1")).samples
    assert sample.inputs["words"] == [-1, 0, 0, 0, 1, 2, 2, 2, -1]
    seen = set()
    for draw in range(40):
        hidden = (task.collate([sample], processor, draw)["labels"][0] != -100).tolist()
        assert hidden[1] == hidden[2] == hidden[3]
        assert hidden[5] == hidden[6] == hidden[7]
        seen.add(tuple(hidden))
    assert len(seen) > 2
    with pytest.raises(UsageError, match="where words are"):
        task.check_processor(_one_word())


def _one_word():
    """A tokenizer to which any text is one word."""
    processor = word_piece()
    processor.add_special_tokens({"mask_token": "[MASK]"})
    processor.backend_tokenizer.pre_tokenizer = tiny_tokenizer(None).backend_tokenizer.pre_tokenizer.__class__(
        add_prefix_space=False, use_regex=False
    )
    return processor


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(UsageError, match="no mask token"):
        TASK.check_processor(word_piece())


def test_a_share_of_one_is_no_share():
    with pytest.raises(UsageError, match="mlm_probability"):
        TASK.configure({"mlm_probability": 1.0})


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_the_models_own(kind):
    batch = TASK.collate(SAMPLES, PROCESSOR)
    made = model(kind)
    own = made(**batch).loss
    count = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        for loss in (TASK.loss, TASK.fast_loss):
            found = loss(made, batch)
            assert found.count == count
            assert float(found.total / count) == pytest.approx(float(own), rel=1e-5)
            best = made(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
            assert int(found.hits["token_accuracy"]) == int((best == batch["labels"]).sum())


def test_one_batch_of_eight_is_eight_of_one():
    made = model()
    total, count, gradient = summed(TASK, made, SAMPLES, PROCESSOR, 8)
    cut_total, cut_count, cut_gradient = summed(TASK, made, SAMPLES, PROCESSOR, 1)
    assert cut_count == count
    assert cut_total == pytest.approx(total, rel=1e-5)
    assert torch.allclose(cut_gradient, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("saved", [None, "head"])
def test_the_head_at_masked_tokens_only_gives_the_plain_gradient(kind, saved):
    """With LoRA in every linear layer, and with the head trained too."""
    made = model(kind)
    head = next(n for n, m in made.named_modules() if m is made.get_output_embeddings())
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=[head] if saved else None)
    adapted = get_peft_model(made, config).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    batch = TASK.collate(SAMPLES, PROCESSOR)
    verdict = verify(
        lambda: TASK.fast_loss(adapted, batch).total, lambda: TASK.loss(adapted, batch).total, parameters, torch.float32
    )
    assert verdict.exact, verdict.reason
    assert not verdict.unreached


def test_the_vocabulary_head_sees_masked_tokens_only():
    made = model()
    batch = TASK.collate(SAMPLES, PROCESSOR)
    seen = []
    made.cls.predictions.transform.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    found = TASK.fast_loss(made, batch)
    assert seen == [(1, found.count, 16)]
    made(**batch)
    assert seen[-1] == (*batch["input_ids"].shape, 16)  # nothing stays behind on the model


def test_a_model_whose_body_is_not_known_is_refused():
    made = model()
    made.base_model_prefix = "nothing"
    with pytest.raises(AdapterError, match="no body"):
        body_of(made)
    with pytest.raises(AdapterError, match="line up"):
        masked_loss(model(), {"input_ids": torch.ones(1, 5, dtype=torch.long)}, torch.zeros(1, 4, dtype=torch.long))


def test_perplexity_is_that_of_all_masked_tokens():
    """The formula in float64 over logits; the pipeline takes it from the mean loss of tasks that say so."""
    assert TASK.perplexity
    made = model()
    nll = []
    total = count = 0.0
    with torch.no_grad():
        for s in SAMPLES:
            batch = TASK.collate([s], PROCESSOR)
            at = batch["labels"] != -100
            logits = made(input_ids=batch["input_ids"]).logits[at].double()
            nll += functional.cross_entropy(logits, batch["labels"][at], reduction="none").tolist()
        for start in (0, 3):
            found = TASK.fast_loss(made, TASK.collate(SAMPLES[start : start + 3 + 2 * (start > 0)], PROCESSOR))
            total, count = total + float(found.total), count + found.count
    assert math.exp(total / count) == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_blanks_are_filled_as_transformers_own_pipeline_fills_them():
    made = model()
    texts = ["the [MASK] sat", "a big red [MASK] while rain fell all night", "[MASK] dog"]
    rows = [Example({"text": t}, f"r:{i}") for i, t in enumerate(texts)]
    found = list(TASK.predict(made, PROCESSOR, rows, PredictOptions(1, 2, OPTIONS)))
    fill = pipeline("fill-mask", model=made, tokenizer=PROCESSOR, top_k=1)
    for text, p in zip(texts, found, strict=True):
        (best,) = fill(text)
        assert p.output == best["sequence"]
        assert p.details == {"filled": [best["token_str"]]}
        assert (p.input, p.reference) == (text, None)


def test_blanks_in_every_piece_of_a_long_text_are_filled():
    text = f"[MASK] {' '.join(WORDS.split()[:15])} [MASK]"
    (found,) = TASK.predict(model(), PROCESSOR, [Example({"text": text}, "r:1")], PredictOptions(1, 2, OPTIONS))
    assert len(found.details["filled"]) == 2
    assert " ".join(text.split()[1:-1]) in found.output
    assert "[MASK]" not in found.output


def test_rows_without_a_blank_are_named():
    rows = [Example({"text": "the [MASK]"}, "r.txt:1"), Example({"text": "the cat"}, "r.txt:2")]
    with pytest.raises(DataError, match="no mask token in this row") as caught:
        TASK.predict(model(), PROCESSOR, rows, PredictOptions(1, 2, OPTIONS))
    assert caught.value.where == "r.txt:2"


def test_text_with_blanks_is_not_trained_on():
    found = TASK.encoder(PROCESSOR, OPTIONS)(Example({"text": "the [MASK] sat"}, "r:1"))
    assert [s.labelled for s in found.samples] == [0]
    assert "prediction" in found.outcome
    assert "labels" not in TASK.collate(found.samples, PROCESSOR)


def test_a_shown_sample_marks_what_is_to_be_guessed():
    labels = TASK.collate(SAMPLES[:1], PROCESSOR)["labels"][0]
    tokens = PROCESSOR.convert_ids_to_tokens(SAMPLES[0].inputs["input_ids"])
    wanted = [f"[[{t}]]" if y != -100 else t for t, y in zip(tokens, labels.tolist(), strict=True)]
    assert TASK.show(SAMPLES[0], PROCESSOR) == " ".join(wanted)
