"""Speech recognition, CTC and Whisper: rows, losses against Transformers' own, and transcripts."""

import dataclasses
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch

from lora_ft.errors import DataError, UsageError
from lora_ft.records import EncodeOptions, Example, Prediction, PredictOptions
from lora_ft.tasks._speech import judge_transcripts, normalised
from lora_ft.tasks.speech_recognition import SpeechRecognition
from lora_ft.tasks.speech_recognition_ctc import SpeechRecognitionCTC
from tests.tiny_readers import loss_and_gradient
from tests.tiny_sounds import OPTIONS, hearing, tone_row, write_tone

TEXTS = ["see the bell", "ab", "a good book", "cc", "de", "look"]
SECONDS = [0.4, 0.3, 0.5, 0.3, 0.6, 0.45]
KINDS = {"ctc": (SpeechRecognitionCTC, "tiny-wav2vec2"), "whisper": (SpeechRecognition, "tiny-whisper")}
PREDICT = PredictOptions(8, 4, OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speech")


def rows(folder, texts=TEXTS, seconds=SECONDS, **settings):
    return [tone_row(folder, i, s, text=t, **settings) for i, (t, s) in enumerate(zip(texts, seconds, strict=True), 1)]


def encoded(task, examples, processor, options=OPTIONS):
    encode = task.encoder(processor, options)
    return [s for e in examples for s in encode(e).samples]


@pytest.fixture(params=KINDS)
def made(request, folder):
    """(task, model, samples, processor, examples)"""
    kind, name = KINDS[request.param]
    task = kind().configure({})
    model, processor = hearing(task, name, folder)
    examples = rows(folder)
    return task, model, encoded(task, examples, processor), processor, examples


def test_the_loss_is_transformers_own(made):
    task, model, samples, processor, _ = made
    batch = task.collate(samples, processor)
    found = task.loss(model, batch)
    own = float(model(**batch).loss.detach())
    assert float(found.total.detach()) / found.count == pytest.approx(own, rel=1e-5)


def test_a_step_cut_into_single_rows_gives_the_same_gradient(made):
    task, model, samples, processor, _ = made
    whole, gradient = loss_and_gradient(task, model, samples, processor, 6)
    single, same = loss_and_gradient(task, model, samples, processor, 1)
    assert single == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    assert gradient.abs().max() > 1e-3


def test_the_sounds_are_what_transformers_own_processor_makes(made):
    task, _, samples, processor, examples = made
    import soundfile

    sounds = [soundfile.read(f"{e.root}/{e.fields['audio']}", dtype="float32")[0] for e in examples]
    masks = {} if "Whisper" in type(processor).__name__ else {"padding": True, "return_attention_mask": True}
    want = processor.feature_extractor(sounds, sampling_rate=16_000, return_tensors="pt", **masks)
    batch = task.collate(samples, processor)
    assert set(batch) == {*want, "labels"}
    for name, tensor in want.items():
        torch.testing.assert_close(batch[name].float(), tensor.float(), rtol=0, atol=1e-6)
    for row, sample in zip(batch["labels"], samples, strict=True):
        assert row[row != -100].tolist() == sample.inputs["labels"]


def test_ctc_labels_are_the_tokenizers_letters(folder):
    task = SpeechRecognitionCTC()
    _, processor = hearing(task, "tiny-wav2vec2", folder)
    (sample,) = encoded(task, rows(folder, ["See  the\nbell"], [0.5]), processor)
    assert sample.inputs["labels"] == processor.tokenizer("see the bell").input_ids
    assert task.show(sample, processor).endswith("1.wav (0.50 s) [[see the bell]]")


def test_letters_that_the_tokenizer_lacks_are_named_or_left_out(folder):
    _, processor = hearing(SpeechRecognitionCTC(), "tiny-wav2vec2", folder)
    with pytest.raises(ValueError, match=r"does not have ! 7 é; task\.unknown_letters: drop"):
        encoded(SpeechRecognitionCTC(), rows(folder, ["café 7!"], [0.5]), processor)
    dropping = SpeechRecognitionCTC().configure({"unknown_letters": "drop"})
    (sample,) = encoded(dropping, rows(folder, ["café 7!"], [0.5]), processor)
    assert sample.inputs["labels"] == processor.tokenizer("caf").input_ids
    with pytest.raises(ValueError, match="no letter that the model's tokenizer has"):
        encoded(dropping, rows(folder, ["7 !"], [0.5]), processor)
    with pytest.raises(ValueError, match="does not have S"):
        encoded(SpeechRecognitionCTC().configure({"case": "keep"}), rows(folder, ["See"], [0.5]), processor)


@pytest.mark.parametrize(("text", "seconds", "fits"), [("abcdef", 0.13, True), ("abcdeff", 0.13, False),
                                                       ("aaa", 0.105, True), ("aaaa", 0.125, False)])  # fmt: skip
def test_a_text_too_long_for_its_sound_is_refused(folder, text, seconds, fits):
    """The oracle is PyTorch: the loss of a text that does not fit is infinite."""
    task = SpeechRecognitionCTC()
    model, processor = hearing(task, "tiny-wav2vec2", folder)
    example = rows(folder, [text], [seconds])
    loose = dataclasses.replace(encoded(task, rows(folder, ["a"], [seconds]), processor)[0])
    loose = dataclasses.replace(loose, inputs={**loose.inputs, "labels": processor.tokenizer(text).input_ids})
    loss = task.loss(model, task.collate([loose], processor)).total
    assert bool(loss.isfinite()) == fits
    if fits:
        assert encoded(task, example, processor)
    else:
        with pytest.raises(ValueError, match=r"needs [78] frames of sound, there are 6"):
            encoded(task, example, processor)


def test_double_letters_survive_decoding(folder):
    """Repeats are merged before blanks are dropped, not after."""
    task = SpeechRecognitionCTC()
    model, processor = hearing(task, "tiny-wav2vec2", folder)
    tokens = (*"bo", "<pad>", *"oo", "<pad>", *"k|", "<pad>", *"|a")
    path = [processor.tokenizer.convert_tokens_to_ids(t) for t in tokens]
    logits = torch.nn.functional.one_hot(torch.tensor([path]), 32).float()

    class Fixed(torch.nn.Module):
        config = model.config

        def forward(self, **batch):
            from types import SimpleNamespace

            return SimpleNamespace(logits=logits)

        def _get_feat_extract_output_lengths(self, lengths):
            return torch.tensor([len(path)])

    batch = {"input_values": torch.zeros(1, 10), "attention_mask": torch.ones(1, 10).long()}
    (ids,) = task.write(Fixed(), processor, batch, 8)
    assert task.spelled(processor, ids, True).split() == ["book", "a"]


def test_a_model_normalised_over_time_answers_each_row_as_if_alone(folder):
    """wav2vec2-base sees padding even where it is masked; with other rows beside it, a row's loss must not change."""
    task = SpeechRecognitionCTC()
    model, processor = hearing(
        task, "tiny-wav2vec2", folder, feat_extract_norm="group", do_stable_layer_norm=False, conv_bias=False
    )
    samples = encoded(task, rows(folder), processor)
    batch = task.collate(samples, processor)
    with torch.no_grad():
        alone = [task.loss(model, task.collate([s], processor)) for s in samples]
        together = task.loss(model, batch)
        naive = float(model(**batch).loss)
    assert float(together.total) == pytest.approx(sum(float(a.total) for a in alone), rel=1e-5)
    assert naive != pytest.approx(float(together.total) / together.count, rel=3e-4)


def test_whisper_learns_language_and_task_before_the_text(folder):
    task = SpeechRecognition().configure({"language": "German"})
    _, processor = hearing(task, "tiny-whisper", folder)
    assert task.check_processor(processor) == []
    (sample,) = encoded(task, rows(folder, ["ab"], [0.4]), processor)
    names = processor.tokenizer.convert_ids_to_tokens(sample.inputs["labels"])
    assert names == ["<|de|>", "<|transcribe|>", "<|notimestamps|>", "a", "b", "<|endoftext|>"]
    assert sample.length == 100 + 6  # 2 s of encoder positions and the text
    batch = task.collate([sample], processor)
    assert batch["input_features"].shape == (1, 80, 200)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"suppress_tokens": False}])
def test_whisper_writes_what_its_own_generate_writes(folder, options):
    task = SpeechRecognition().configure({"language": "en", **options})
    model, processor = hearing(task, "tiny-whisper", folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # so that rows differ
        model.model.encoder.conv1.weight.mul_(20)
        model.proj_out.weight.add_(0.3 * torch.randn(model.proj_out.weight.shape, generator=generator))
    first = task.write(model, processor, task.collate(encoded(task, rows(folder), processor), processor), 8)
    often = max({t for row in first for t in row}, key=lambda t: sum(t in row for row in first))
    model.generation_config.suppress_tokens = [often]
    task.configure(options)
    examples = rows(folder)
    batch = {k: v for k, v in task.collate(encoded(task, examples, processor), processor).items() if k != "labels"}
    stock = model.generate(
        **batch, language="en", task="transcribe", max_new_tokens=8, num_beams=options.get("num_beams", 1),
        suppress_tokens=[often] if options.get("suppress_tokens", True) else [], do_sample=False,
    )  # fmt: skip
    want = processor.batch_decode(stock, skip_special_tokens=True)
    found = list(task.predict(model, processor, examples, PREDICT))
    assert [p.output for p in found] == [w.strip() for w in want]
    assert [p.reference for p in found] == TEXTS
    assert (first != task.write(model, processor, batch, 8)) == options.get("suppress_tokens", True)


def test_whisper_options_that_do_not_go_with_the_model_are_refused(folder):
    _, ctc = hearing(SpeechRecognitionCTC(), "tiny-wav2vec2", folder)
    _, whisper = hearing(SpeechRecognition(), "tiny-whisper", folder)
    with pytest.raises(UsageError, match="no languages to choose from"):
        SpeechRecognition().configure({"language": "en"}).check_processor(ctc)
    with pytest.raises(UsageError, match="'germann' is not known; did you mean 'german'"):
        SpeechRecognition().configure({"language": "germann"}).check_processor(whisper)
    with pytest.raises(UsageError, match=r"task\.task needs task\.language"):
        SpeechRecognition().configure({"task": "translate"})
    assert "task.language is not set" in SpeechRecognition().check_processor(whisper)[0]
    with pytest.raises(UsageError, match="has no tokenizer"):
        SpeechRecognition().check_processor(whisper.feature_extractor)
    with pytest.raises(UsageError, match="takes no sound"):
        SpeechRecognition().check_processor(whisper.tokenizer)


def test_a_sound_over_the_limit_is_dropped_with_its_text(folder):
    task = SpeechRecognitionCTC()
    model, processor = hearing(task, "tiny-wav2vec2", folder)
    examples = rows(folder, ["ab", "cd"], [0.4, 0.9])
    short = EncodeOptions(overlong="drop", max_seconds=0.5)
    encode = task.encoder(processor, short)
    assert [encode(e).outcome for e in examples] == ["", "dropped: longer than 0.5 s"]
    with pytest.raises(ValueError, match=r"longer than 0.5 s; --set data\.overlong=drop"):
        task.encoder(processor, EncodeOptions(overlong="error", max_seconds=0.5))(examples[1])
    with pytest.raises(UsageError, match="would cut a sound and leave its text whole"):
        task.encoder(processor, EncodeOptions(overlong="truncate"))
    found = list(task.predict(model, processor, examples, PredictOptions(8, 4, short)))
    assert [p.cut for p in found] == [False, True]


def test_whisper_hears_no_more_than_its_window(folder):
    task = SpeechRecognition()
    _, processor = hearing(task, "tiny-whisper", folder)
    assert task.encoder(processor, OPTIONS)(rows(folder, ["ab"], [2.5])[0]).outcome == "dropped: longer than 2 s"
    assert task.encoder(processor, OPTIONS)(rows(folder, ["a" * 500], [1.0])[0]).outcome == (
        "dropped: text longer than 448 tokens"
    )


def test_a_bad_row_says_what_is_wrong(folder):
    task = SpeechRecognitionCTC()
    model, processor = hearing(task, "tiny-wav2vec2", folder)
    with pytest.raises(ValueError, match="the row's text is empty"):
        encoded(task, rows(folder, ["  "], [0.4]), processor)
    with pytest.raises(ValueError, match=r"0\.010 s of sound, a model needs at least 0\.025 s"):
        encoded(task, rows(folder, ["a"], [0.01]), processor)
    gone = Example({"audio": "gone.wav", "text": "a"}, "r.jsonl:9", root=str(folder))
    with pytest.raises(DataError) as caught:
        list(task.predict(model, processor, [gone], PREDICT))
    assert caught.value.where == "r.jsonl:9"


def test_resampled_sounds_are_counted(folder):
    task = SpeechRecognitionCTC()
    _, processor = hearing(task, "tiny-wav2vec2", folder)
    example = tone_row(folder, 3, 0.5, 8_000, text="ab")
    found = task.encoder(processor, OPTIONS)(example)
    assert found.outcome == "resampled from 8,000 Hz"
    assert found.samples[0].inputs["samples"] == 8_000
    with pytest.raises(ValueError, match="8,000 Hz, the model wants 16,000 Hz"):
        task.encoder(processor, EncodeOptions(overlong="drop", resample=False))(example)


def told(outputs, references):
    return [Prediction(str(i), "", o, r) for i, (o, r) in enumerate(zip(outputs, references, strict=True))]


def test_error_rates_are_jiwers_over_all_rows():
    outputs, references = ["the cat sat", "hello", ""], ["the cat sat down", "hallo word", "x"]
    found = judge_transcripts([*told(outputs, references), Prediction("9", "", "no reference", None)], False)
    assert found.metrics["wer"] == pytest.approx(jiwer.wer(references, outputs)) == pytest.approx(4 / 7)
    assert found.metrics["cer"] == pytest.approx(jiwer.cer(references, outputs))
    assert found.right == [False, False, False]


def test_case_and_punctuation_count_only_when_asked_for():
    outputs, references = ["Don't stop: it's me."], ["don’t stop - It's ME"]
    assert judge_transcripts(told(outputs, references), True).metrics == {"wer": 0.0, "cer": 0.0, "exact_match": 1.0}
    assert judge_transcripts(told(outputs, references), False).metrics["wer"] == 1.0
    assert normalised("'Quoted' (aside) ÉCOLE 3,5") == "quoted aside école 3 5"
    assert judge_transcripts(told(["a"], ["?!"]), True).metrics == {}


def test_the_models_own_random_masking_is_off(made):
    """With dropout at 0 a model in training answers as one that is judged, so a run can be repeated."""
    task, model, samples, processor, _ = made
    dropouts = {n: 0.0 for n in model.config.to_dict() if n.endswith("dropout")}
    kind = "tiny-wav2vec2" if "input_values" in task.collate(samples, processor) else "tiny-whisper"
    plain, _ = hearing(task, kind, Path(samples[0].inputs["audio"].path).parent, **dropouts)
    batch = task.collate(samples, processor)
    with torch.no_grad():
        judged = float(task.loss(plain.eval(), batch).total)
        assert {float(task.loss(plain.train(), batch).total) for _ in range(3)} == {judged}


def test_bytes_and_arrays_are_sounds_too(folder):
    task = SpeechRecognitionCTC()
    _, processor = hearing(task, "tiny-wav2vec2", folder)
    write_tone(folder / "b.wav", 300, 0.4)
    whole = (folder / "b.wav").read_bytes()
    array = np.frombuffer(whole[44:], "<i2").astype(np.float32) / 32768
    values = ["b.wav", whole, {"bytes": whole, "path": None}, {"array": array, "sampling_rate": 16_000}]
    samples = encoded(
        task, [Example({"audio": v, "text": "ab"}, str(i), root=str(folder)) for i, v in enumerate(values)], processor
    )
    batch = task.collate(samples, processor)
    for row in batch["input_values"][1:]:
        torch.testing.assert_close(row, batch["input_values"][0], rtol=0, atol=1e-5)
