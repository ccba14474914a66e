"""Source and target: encoding, the loss of encoder-decoders, writing, BLEU, chrF and ROUGE-L."""

import copy

import pytest
import sacrebleu
import torch
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from lora_ft.errors import UsageError
from lora_ft.records import EncodeOptions, Example, Prediction, PredictOptions
from lora_ft.registry import TASKS
from lora_ft_adapters import AdapterError
from lora_ft_adapters.fast.verify import verify
from tests.words import BART, T5, summed, word_tokenizer

WORDS = "the cat sat on a mat die katze sass auf einer matte translate :"


def task(**options):
    return TASKS.get("seq2seq-lm").configure(options)


def tiny_t5(size: int) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=1,
        pad_token_id=1, eos_token_id=2, initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def tiny_bart(size: int) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=1,
        eos_token_id=2, bos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=2, init_std=0.5,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


FAMILIES = {"t5": (tiny_t5, T5), "bart": (tiny_bart, BART)}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    make, special = FAMILIES[request.param]
    processor = word_tokenizer(WORDS, special)
    return make(len(processor)).double().eval(), processor


@pytest.fixture(scope="module")
def processor():
    return word_tokenizer(WORDS, T5)


def row(prompt="the cat sat", completion=None, where="f:1"):
    fields = {"prompt": prompt}
    return Example(fields if completion is None else {**fields, "completion": completion}, where)


def encoded(example, processor, chosen=None, max_length=64, overlong="truncate_prompt"):
    return (chosen or task()).encoder(processor, EncodeOptions(max_length, overlong))(example)


def rows(count: int):
    left, right = WORDS.split()[:6], WORDS.split()[6:]
    return [row(" ".join(left[: 1 + i % 5]), " ".join(right[: 1 + i % 4]), str(i)) for i in range(count)]


def samples_of(count, processor):
    return [encoded(r, processor).samples[0] for r in rows(count)]


def test_prefix_source_and_target_end_as_the_tokenizer_ends_them(processor):
    (made,) = encoded(row("the cat", "die katze"), processor, task(source_prefix="translate : ")).samples
    assert processor.convert_ids_to_tokens(made.inputs["input_ids"]) == ["translate", ":", "the", "cat", "</s>"]
    assert processor.convert_ids_to_tokens(made.inputs["labels"]) == ["die", "katze", "</s>"]
    assert (made.length, made.labelled) == (8, 3)
    assert task().show(made, processor) == "translate : the cat </s> [[die katze </s>]]"


def test_target_gets_an_end_token_where_the_tokenizer_adds_none(processor):
    bare = copy.deepcopy(processor)
    from tokenizers.processors import TemplateProcessing

    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    (made,) = encoded(row("the cat", "die katze"), bare).samples
    assert bare.convert_ids_to_tokens(made.inputs["labels"]) == ["die", "katze", "</s>"]


@pytest.mark.parametrize(
    ("overlong", "outcome", "kept"),
    [
        ("truncate", "truncated", True), ("truncate_prompt", "truncated", True),
        ("drop", "dropped: longer than max_length", False), ("error", "over max_length", False),
    ],
)  # fmt: skip
def test_long_source_loses_its_end_but_not_its_end_token(processor, overlong, outcome, kept):
    found = encoded(row("the cat sat on a mat", "die"), processor, max_length=4, overlong=overlong)
    assert found.outcome == outcome
    texts = [processor.convert_ids_to_tokens(s.inputs["input_ids"]) for s in found.samples]
    assert texts == ([["the", "cat", "sat", "</s>"]] if kept else [])


@pytest.mark.parametrize(
    ("overlong", "outcome"),
    [
        ("truncate", "target truncated"), ("truncate_prompt", "dropped: longer than max_target_length"),
        ("drop", "dropped: longer than max_target_length"), ("error", "over max_length"),
    ],
)  # fmt: skip
def test_long_target_is_cut_only_when_asked_and_keeps_its_end(processor, overlong, outcome):
    short = task(max_target_length=3)
    found = encoded(row("the", "die katze sass auf"), processor, short, overlong=overlong)
    assert found.outcome == outcome
    texts = [processor.convert_ids_to_tokens(s.inputs["labels"]) for s in found.samples]
    assert texts == ([["die", "katze", "</s>"]] if overlong == "truncate" else [])
    assert encoded(row("the", "die katze"), processor, short, overlong=overlong).outcome == ""


def test_batch_gives_back_what_was_encoded(family):
    _, processor = family
    samples = samples_of(5, processor)
    batch = task().collate(samples, processor)
    for i, s in enumerate(samples):
        assert batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() == s.inputs["input_ids"]
        assert batch["labels"][i][batch["labels"][i] != -100].tolist() == s.inputs["labels"]
    assert batch["labels"].shape[1] != batch["input_ids"].shape[1]


def test_loss_is_the_models_own(family):
    model, processor = family
    batch = task().collate(samples_of(6, processor), processor)
    found, own = task().loss(model, batch), model(**batch)
    assert found.count == int((batch["labels"] != -100).sum())
    assert torch.isclose(found.total, own.loss * found.count, rtol=1e-9)
    right = (own.logits.argmax(-1) == batch["labels"]).sum()
    assert int(found.hits["token_accuracy"]) == int(right)


def test_smoothed_loss_is_that_of_transformers(family):
    from transformers.trainer_pt_utils import LabelSmoother

    model, processor = family
    batch = task().collate(samples_of(6, processor), processor)
    found = task(label_smoothing_factor=0.2).loss(model, batch)
    own = LabelSmoother(0.2)(model(**batch), batch["labels"])
    assert torch.isclose(found.total.double(), own * found.count, rtol=1e-6)


def test_micro_batches_do_not_change_the_gradient(family):
    model, processor = family
    samples = samples_of(8, processor)
    whole = summed(task(), copy.deepcopy(model), samples, processor, 8)
    parts = summed(task(), copy.deepcopy(model), samples, processor, 1)
    assert whole[:2] == pytest.approx(parts[:2], rel=1e-9)
    assert torch.allclose(whole[2], parts[2], rtol=1e-8, atol=1e-12)


def test_fast_loss_and_its_gradients_are_exact(family):
    model, processor = family
    names = ["q", "v"] if model.config.model_type == "t5" else ["q_proj", "v_proj"]
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=names, r=4, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model).float().requires_grad_(False), config)
    batch = task().collate(samples_of(6, processor), processor)
    plain, fast = task().loss(adapted, batch), task().fast_loss(adapted, batch)
    assert (fast.count, int(fast.hits["token_accuracy"])) == (plain.count, 0)  # not counted while training
    with torch.no_grad():
        judged = task().fast_loss(adapted, batch)
    assert int(judged.hits["token_accuracy"]) == int(plain.hits["token_accuracy"])
    verdict = verify(
        lambda: task().fast_loss(adapted, batch).total,
        lambda: task().loss(adapted, batch).total,
        [p for p in adapted.parameters() if p.requires_grad],
        torch.float32,
    )
    assert verdict.exact, verdict.reason
    assert task().loss(adapted, batch).total == plain.total  # the model is as it was


def test_fast_loss_says_why_it_cannot(family):
    model, processor = family
    batch = task().collate(samples_of(2, processor), processor)
    with pytest.raises(AdapterError, match="label smoothing"):
        task(label_smoothing_factor=0.1).fast_loss(model, batch)
    if hasattr(model, "final_logits_bias"):
        biased = copy.deepcopy(model)
        biased.final_logits_bias += 1
        with pytest.raises(AdapterError, match="bias"):
            task().fast_loss(biased, batch)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_generate_alone_and_in_order(family, beams):
    model, processor = family
    chosen = task(num_beams=beams, source_prefix="translate : ")
    examples = rows(5)
    found = list(chosen.predict(model, processor, examples, PredictOptions(6, 2, EncodeOptions(64))))
    assert [p.where for p in found] == ["0", "1", "2", "3", "4"]
    assert [p.reference for p in found] == [e.fields["completion"] for e in examples]
    assert len({p.output for p in found}) > 1
    for p in found:
        ids = processor(p.input, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=6, num_beams=beams, do_sample=False)[0]
        assert p.output == processor.decode(alone, skip_special_tokens=True)
    assert found[0].input == "translate : the"


def test_length_limits_of_another_task_do_not_stretch_answers(family):
    model, processor = family
    summariser = copy.deepcopy(model)
    summariser.generation_config.update(min_length=50, max_length=60, num_beams=4, early_stopping=True)
    options = PredictOptions(6, 4, EncodeOptions(64))
    found, plain = (list(task().predict(m, processor, rows(4), options)) for m in (summariser, model))
    assert [p.output for p in found] == [p.output for p in plain]


def test_adapter_writes_and_long_sources_are_said_to_be_cut(family):
    model, processor = family
    names = ["q"] if model.config.model_type == "t5" else ["q_proj"]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=names))
    options = PredictOptions(4, 8, EncodeOptions(5))
    plain = list(task().predict(model, processor, rows(5), options))
    found = list(task().predict(adapted, processor, rows(5), options))
    assert [p.output for p in found] == [p.output for p in plain]  # LoRA starts as the base
    cut = [len(processor(e.fields["prompt"])["input_ids"]) > 5 for e in rows(5)]
    assert [p.cut for p in found] == cut
    assert any(cut)
    assert not all(cut)


def test_probes_compare_the_decoder_without_labels(family):
    model, processor = family
    samples = [*samples_of(2, processor), encoded(row("the"), processor).samples[0]]
    probes = task().probes(samples, processor)
    assert all(set(p) == {"input_ids", "decoder_input_ids"} for p in probes)
    assert [task().outputs(model, p).shape[1] for p in probes] == [samples[0].labelled, samples[1].labelled, 1]
    unlabelled = {k: v for k, v in task().collate(samples, processor).items() if k != "labels"}
    assert task().outputs(model, unlabelled).shape[:2] == (3, 1)


def test_generation_config_is_complete(family):
    model, processor = family
    defaults = task().generation_defaults(model, processor)
    start = model.config.decoder_start_token_id
    assert defaults == {"eos_token_id": [2], "pad_token_id": 1, "min_length": 0, "decoder_start_token_id": start}
    assert task().reference_lengths(processor, [row("the", "die katze"), row("the")])[1] is None
    assert task().reference_lengths(processor, [row("the", "die katze")]) == [len(processor("die katze")["input_ids"])]


WRITTEN = [("the cat sat on the mat", "the cat sat on a mat"), ("a dog", "the dog"), ("same words here now",) * 2]


def predictions(pairs):
    return [Prediction(str(i), "", o, r) for i, (o, r) in enumerate(pairs)]


def test_metrics_are_those_of_sacrebleu_and_a_hand_count():
    judged = task(metrics=["bleu", "chrf", "rouge_l", "exact_match"]).judge(
        predictions([*WRITTEN, ("of no reference", None)])
    )
    outputs, references = [o for o, _ in WRITTEN], [r for _, r in WRITTEN]
    # longest common subsequences: 5 of 6 and 6 words, 1 of 2 and 2, 4 of 4 and 4
    assert judged.metrics == pytest.approx(
        {
            "exact_match": 1 / 3,
            "bleu": sacrebleu.corpus_bleu(outputs, [references]).score,
            "chrf": sacrebleu.corpus_chrf(outputs, [references]).score,
            "rouge_l": (5 / 6 + 1 / 2 + 1) / 3,
        },
        abs=1e-6,
    )
    assert 0 < judged.metrics["bleu"] < 100
    assert judged.right == [False, False, True]


def test_metrics_follow_the_options():
    assert set(task().judge(predictions(WRITTEN)).metrics) == {"exact_match", "bleu", "chrf"}
    only = task(metrics=["chrf"]).judge(predictions(WRITTEN))
    assert set(only.metrics) == {"chrf"}
    assert only.right == [False, False, True]
    assert task().judge(predictions([("a", None)])).metrics == {}
    chinese = predictions([("猫坐在垫子上面", "猫坐在垫子上")])
    words, signs = (task(metrics=["bleu"], bleu_tokenize=t).judge(chinese).metrics["bleu"] for t in ("13a", "zh"))
    assert words < 1 < 50 < signs


def test_wrong_options_and_missing_packages_say_what_to_do(monkeypatch):
    with pytest.raises(UsageError, match=r"task\.metrics"):
        task(metrics=["blue"])
    with pytest.raises(UsageError, match="must be auto or a list"):
        task(metrics="bleu")
    monkeypatch.setattr("lora_ft.tasks._generation_metrics.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="metric bleu needs the package sacrebleu") as caught:
        task()
    assert "pip install 'lora-ft[text]'" in caught.value.fix
    assert task(metrics=["exact_match"])


def multilingual(kind):
    from transformers import MBartTokenizer, NllbTokenizer

    vocab = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "c"]
    if kind == "nllb":
        return NllbTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[]), ("eng_Latn", "fra_Latn")
    return MBartTokenizer(vocab=[(t, -1.0 * i) for i, t in enumerate(vocab)]), ("en_XX", "ro_RO")


@pytest.mark.parametrize("kind", ["nllb", "mbart"])
def test_languages_mark_both_sides_and_start_the_answer(kind):
    from transformers import M2M100Config, M2M100ForConditionalGeneration, MBartConfig, MBartForConditionalGeneration

    processor, (source, target) = multilingual(kind)
    chosen = task(src_lang=source, tgt_lang=target)
    assert chosen.check_processor(processor) == []
    (made,) = encoded(row("a b", "b c"), processor, chosen).samples
    spoken = [set(processor.convert_ids_to_tokens(made.inputs[n])) & {source, target} for n in ("input_ids", "labels")]
    assert spoken == [{source}, {target}]
    config, kinds = (
        (M2M100Config, M2M100ForConditionalGeneration)
        if kind == "nllb"
        else (MBartConfig, MBartForConditionalGeneration)
    )
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    model = kinds(config(vocab_size=len(processor), max_position_embeddings=32, **small, **heads)).eval()
    language = processor.convert_tokens_to_ids(target)
    found = chosen.generation_defaults(model, processor)
    name = "forced_bos_token_id" if kind == "nllb" else "decoder_start_token_id"
    assert found[name] == language
    batch = chosen.collate([made], processor)
    plain = chosen.loss(model, batch)
    model.requires_grad_(False)
    assert torch.isclose(chosen.fast_loss(model, batch).total, plain.total, rtol=1e-5)
    assert len(list(chosen.predict(model, processor, [row("a b")], PredictOptions(3, 1, EncodeOptions(16))))) == 1


def test_languages_are_asked_for_where_the_tokenizer_needs_them(processor):
    nllb, _ = multilingual("nllb")
    with pytest.raises(UsageError, match=r"task\.src_lang is missing"):
        task().check_processor(nllb)
    with pytest.raises(UsageError, match=r"task\.tgt_lang: 'fra_Latin' is no language .* did you mean 'fra_Latn'"):
        task(src_lang="eng_Latn", tgt_lang="fra_Latin").check_processor(nllb)
    with pytest.raises(UsageError, match="knows no languages"):
        task(tgt_lang="de").check_processor(processor)
    nameless = word_tokenizer("a", {k: v for k, v in T5.items() if k != "pad_token"})
    with pytest.raises(UsageError, match="no padding token"):
        task().check_processor(nameless)
