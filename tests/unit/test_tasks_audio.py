"""Audio classification: rows, padding, augmentation and its randomness, losses against Transformers' own."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import ASTFeatureExtractor

from lora_ft.errors import UsageError
from lora_ft.media import cache
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.tasks.audio_classification import AudioClassification
from tests.tiny_readers import loss_and_gradient
from tests.tiny_sounds import hearing, tone_row

OPTIONS = EncodeOptions(overlong="truncate")
NAMES = ["low", "high", "low", "high", "middle", "middle"]
SECONDS = [0.3, 0.5, 0.25, 0.3, 0.45, 0.6]
AUGMENT = {"noise": 1.0, "gain_db": [-6, 6], "shift": 0.2, "time_mask": [2, 0.3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sounds")


def rows(folder):
    return [tone_row(folder, i, s, label=n) for i, (n, s) in enumerate(zip(NAMES, SECONDS, strict=True), 1)]


def made(folder, name="tiny-wav2vec2", options=(), **changes):
    """(task, model, samples, feature extractor, rows)"""
    examples = rows(folder)
    task = AudioClassification().configure(dict(options)).learn(examples, [])
    model, processor = hearing(task, name, folder, **changes)
    encode = task.encoder(processor.feature_extractor, OPTIONS)
    return task, model, [s for e in examples for s in encode(e).samples], processor.feature_extractor, examples


GROUP = {"feat_extract_norm": "group", "do_stable_layer_norm": False}


@pytest.mark.parametrize(("name", "changes"), [("tiny-wav2vec2", {}), ("tiny-whisper", {}), ("tiny-wav2vec2", GROUP)])
def test_the_loss_is_the_models_own_on_single_rows_however_the_step_is_cut(folder, name, changes):
    task, model, samples, extractor, _ = made(folder, name, **changes)
    with torch.no_grad():
        own = [float(model(**task.collate([s], extractor)).loss) for s in samples]
    whole, gradient = loss_and_gradient(task, model, samples, extractor, 6)
    single, same = loss_and_gradient(task, model, samples, extractor, 1)
    assert whole == pytest.approx(sum(own) / len(own), rel=1e-5)
    assert single == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_a_model_that_masks_padding_has_transformers_own_loss_on_a_batch(folder):
    task, model, samples, extractor, _ = made(folder)
    batch = task.collate(samples, extractor)
    with torch.no_grad():
        own, found = float(model(**batch).loss), task.loss(model, batch)
    assert float(found.total) / found.count == pytest.approx(own, rel=1e-5)


def test_several_labels_have_binary_cross_entropy(folder):
    examples = [
        tone_row(folder, i, 0.3, labels=n) for i, n in enumerate([["a"], ["a", "b"], [], ["b"]], 1)
    ]  # fmt: skip
    task = AudioClassification().learn(examples, [])
    model, processor = hearing(task, "tiny-wav2vec2", folder)
    encode = task.encoder(processor, OPTIONS)
    batch = task.collate([s for e in examples for s in encode(e).samples], processor)
    with torch.no_grad():
        found, logits = task.loss(model, batch), task.answer(model, batch).logits
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])
    assert float(found.total) / found.count == pytest.approx(float(want), rel=1e-5)


def test_a_long_sound_loses_its_end_and_says_so(folder):
    task, _, _, extractor, examples = made(folder)
    limit = EncodeOptions(overlong="truncate", max_seconds=0.4)
    found = [task.encoder(extractor, limit)(e) for e in examples]
    assert [f.outcome for f in found] == ["", "truncated to 0.4 s", "", "", *["truncated to 0.4 s"] * 2]
    batch = task.collate([f.samples[0] for f in found], extractor)
    assert batch["attention_mask"].sum(-1).tolist() == [4800, 6400, 4000, 4800, 6400, 6400]
    dropping = EncodeOptions(overlong="drop", max_seconds=0.4)
    assert task.encoder(extractor, dropping)(examples[1]).outcome == "dropped: longer than 0.4 s"
    with pytest.raises(ValueError, match=r"longer than 0\.4 s; --set data\.overlong=truncate"):
        task.encoder(extractor, EncodeOptions(overlong="error", max_seconds=0.4))(examples[1])
    both = task.encoder(extractor, limit)(tone_row(folder, 9, 0.5, 8_000, label="low"))
    assert both.outcome == "resampled from 8,000 Hz, truncated to 0.4 s"


def test_predictions_have_a_score_for_each_class(folder):
    task, model, _, extractor, examples = made(folder)
    asked = [Example({"audio": e.fields["audio"]}, e.where, root=e.root) for e in examples]
    found = list(task.predict(model, extractor, asked, PredictOptions(1, 4, OPTIONS)))
    assert [p.input for p in found] == [e.fields["audio"] for e in examples]
    for p in found:
        assert sum(p.details["scores"].values()) == pytest.approx(1)
        assert p.output == max(p.details["scores"], key=p.details["scores"].get)
        assert p.reference is None


@pytest.mark.parametrize("name", ["tiny-wav2vec2", "tiny-whisper"])
def test_augmentation_depends_on_draw_and_row_alone(folder, name):
    """Not on the batch, the thread or the order, so that workers and resuming never change a run."""
    masks = {"frequency_mask": [1, 20]} if name == "tiny-whisper" else {}
    task, _, samples, extractor, _ = made(folder, name, {"augment": {**AUGMENT, **masks}}.items())
    key = extractor.model_input_names[0]

    def one(sample, draw):
        return task.collate([sample], extractor, draw)[key][0]

    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda s: one(s, 5), samples * 3))
    together = task.collate(samples[::-1], extractor, 5)[key].flip(0)
    plain = task.collate(samples, extractor)[key]
    for i, sample in enumerate(samples):
        alone = one(sample, 5)
        assert all(torch.equal(alone, threaded[i + n * len(samples)]) for n in range(3))
        torch.testing.assert_close(together[i][..., : alone.shape[-1]], alone, rtol=0, atol=2e-6)
        assert not torch.allclose(alone, one(sample, 6), atol=1e-3)
        assert not torch.allclose(alone, plain[i][..., : alone.shape[-1]], atol=1e-3)
    torch.testing.assert_close(task.collate(samples, extractor, 0)[key], plain, rtol=0, atol=0)


def test_masks_of_a_spectrogram_leave_its_padding_alone(folder):
    task, _, samples, extractor, _ = made(folder, "tiny-whisper", {"augment": {"time_mask": [3, 0.5]}}.items())
    plain = task.collate(samples, extractor)["input_features"]
    masked = task.collate(samples, extractor, 3)["input_features"]
    for before, after, sample in zip(plain, masked, samples, strict=True):
        changed = (before != after).any(0).nonzero().flatten()
        assert 0 < len(changed) <= sample.inputs["samples"] // 160 + 1
        assert int(changed.max()) <= sample.inputs["samples"] // 160


def test_the_global_random_state_is_left_alone(folder):
    task, _, samples, extractor, _ = made(folder, options={"augment": AUGMENT}.items())
    before = np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    task.collate(samples, extractor, 4)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_mask_of_a_spectrogram_that_there_is_not_is_refused(folder):
    task, _, _, extractor, _ = made(folder, options={"augment": {"frequency_mask": [1, 8]}}.items())
    with pytest.raises(UsageError, match="no spectrogram to mask"):
        task.check_processor(extractor)
    task.check_processor(ASTFeatureExtractor(num_mel_bins=40))
    with pytest.raises(UsageError, match=r"task\.augment\.nois: audio-classification has no such option"):
        AudioClassification().configure({"augment": {"nois": 1}})


def test_a_kept_sound_is_the_same_as_a_read_one(folder, tmp_path, monkeypatch):
    task, _, samples, extractor, _ = made(folder)
    plain = task.collate(samples, extractor)["input_values"]
    kept = cache.Cache(tmp_path, 10**7)
    monkeypatch.setattr(cache, "shared", lambda: kept)
    for _ in range(2):
        torch.testing.assert_close(task.collate(samples, extractor)["input_values"], plain, rtol=0, atol=0)
    assert len(list(tmp_path.rglob("*.npy"))) == len(samples)
