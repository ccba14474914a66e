"""Image classification: from rows to the verdict, against Transformers' own processors, losses and formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score
from torch.nn import functional

from lora_ft.data import encode_all
from lora_ft.errors import ArtifactError, DataError, UsageError
from lora_ft.media import cache
from lora_ft.records import EncodeOptions, PredictOptions
from lora_ft.tasks import _images
from lora_ft.tasks.image_classification import ImageClassification
from tests.tiny_images import OPTIONS, image_rows, seeing, write_noise
from tests.tiny_readers import loss_and_gradient

MODELS = ["tiny-resnet", "tiny-vit", "tiny-mobilenet"]
SIDES = ["cat", "dog", "cat", "cow", "dog", "cat", "cow", "dog"]
SETS = [["cat"], ["cat", "dog"], [], ["cow"], ["dog"], ["cat", "cow"], ["cat"], ["cow", "dog"]]
KINDS = pytest.mark.parametrize(("answers", "key"), [(SIDES, "label"), (SETS, "labels")], ids=["single", "multi"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def made(folder, bases, name="tiny-vit", answers=SIDES, key="label", **options):
    """(task, model, samples, processor)"""
    rows = image_rows(folder, answers, key)
    task = ImageClassification().configure(options).learn(rows, [])
    model, processor = seeing(name, bases, task)
    encode = task.encoder(processor, OPTIONS)
    return task, model, [s for r in rows for s in encode(r).samples], processor


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [0, 2**20], ids=["uncached", "cached"])
def test_pixels_are_bit_for_bit_the_processors_own(tmp_path, bases, name, budget, monkeypatch):
    monkeypatch.setattr(cache, "_open", {"cache": cache.Cache(tmp_path / "cache", budget)})
    task, _, samples, processor = made(tmp_path, bases, name)
    opened = [Image.open(tmp_path / f"{i}.png").convert("RGB") for i in range(len(SIDES))]
    wanted = processor(images=opened, return_tensors="pt")["pixel_values"]
    for _ in range(2):
        batch = task.collate(samples, processor)
        assert torch.equal(batch["pixel_values"], wanted)
    assert batch["labels"].tolist() == [task.labels.index(s) for s in SIDES]
    assert {s.length for s in samples} == {-(-wanted.shape[-1] * wanted.shape[-2] // 256)}
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == (len(SIDES) if budget else 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [24, (16, 28)])
def test_a_size_of_the_recipe_replaces_the_processors_resizing_and_keeps_its_normalising(tmp_path, bases, name, size):
    task, _, samples, processor = made(tmp_path, bases, name, image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    found = task.collate(samples, processor)["pixel_values"]
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    for i, row in enumerate(found):
        image = Image.open(tmp_path / f"{i}.png").convert("RGB").resize((width, height), processor.resample)
        wanted = (np.asarray(image).astype(np.float64).transpose(2, 0, 1) / 255 - mean) / std
        np.testing.assert_allclose(row.numpy(), wanted, atol=1e-5)


def test_position_embeddings_are_stretched_to_a_size_of_the_recipe(tmp_path, bases):
    task, model, samples, processor = made(tmp_path, bases, image_size=(16, 48))
    batch = task.collate(samples, processor)
    with torch.no_grad():
        wanted = model(batch["pixel_values"], interpolate_pos_encoding=True).logits
        assert torch.equal(task.answer(model, batch).logits, wanted)
    assert not _images.resizable(seeing("tiny-resnet", bases)[0])


def test_a_model_that_takes_one_size_only_refuses_another_in_words(tmp_path, bases):
    task, _, samples, processor = made(tmp_path, bases, image_size=48)

    class Fixed(torch.nn.Module):
        def forward(self, pixel_values):
            raise ValueError("expected 32")

    with pytest.raises(UsageError, match=r"task\.image_size: this model takes no images of 48 x 48: expected 32"):
        task.answer(Fixed(), task.collate(samples, processor))


@KINDS
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_own_however_the_step_is_cut(tmp_path, bases, name, answers, key):
    task, model, samples, processor = made(tmp_path, bases, name, answers, key)
    own = float(model(**task.collate(samples, processor)).loss.detach())
    whole, gradient = loss_and_gradient(task, model, samples, processor, 8)
    single, same = loss_and_gradient(task, model, samples, processor, 1)
    assert whole == pytest.approx(own, rel=1e-5)
    assert single == pytest.approx(own, rel=1e-5)
    torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_weights_and_smoothing_follow_the_formula(tmp_path, bases):
    options = {"class_weights": {"cat": 1.0, "dog": 4.0, "cow": 0.5}, "label_smoothing_factor": 0.3}
    task, model, samples, processor = made(tmp_path, bases, **options)
    batch = task.collate(samples, processor)
    with torch.no_grad():
        found = task.loss(model, batch)
        logits = model(batch["pixel_values"]).logits
    wanted = functional.cross_entropy(
        logits.double(), batch["labels"], torch.tensor([1.0, 0.5, 4.0]).double(), label_smoothing=0.3
    )
    assert task.labels == ("cat", "cow", "dog")
    assert float(found.total) / found.count == pytest.approx(float(wanted), rel=1e-5)


@KINDS
def test_predictions_are_sorted_out_with_the_score_of_each_label(tmp_path, bases, answers, key):
    task, model, samples, processor = made(tmp_path, bases, answers=answers, key=key)
    rows = image_rows(tmp_path, answers, key)
    rows[3] = replace(rows[3], fields={"image": rows[3].fields["image"]})
    found = list(task.predict(model, processor, rows, PredictOptions(1, 3, OPTIONS)))
    with torch.no_grad():
        logits = model(task.collate(samples, processor)["pixel_values"]).logits
    for i, prediction in enumerate(found):
        scores = logits[i].sigmoid() if key == "labels" else logits[i].softmax(-1)
        given = prediction.details["scores"]
        assert list(given) == list(task.labels)
        assert list(given.values()) == pytest.approx(scores.tolist(), abs=1e-5)
        chosen = [n for n, p in given.items() if p >= 0.5] if key == "labels" else [max(given, key=given.get)]
        assert (prediction.output, prediction.input) == (", ".join(chosen), f"{i}.png")
        answer = answers[i] if key == "labels" else [answers[i]]
        assert prediction.reference == (None if i == 3 else ", ".join(answer))


def test_metrics_are_scikit_learns(tmp_path, bases):
    task, model, samples, processor = made(tmp_path, bases)
    with torch.no_grad():
        outputs = task.loss(model, task.collate(samples, processor)).outputs
    judged = task.measure(samples, [{k: v[i] for k, v in outputs.items()} for i in range(len(samples))])
    told = [task.labels[i] for i in outputs["logits"].argmax(-1)]
    assert judged.metrics["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(told, SIDES, strict=True)]))
    assert judged.metrics["f1_macro"] == pytest.approx(f1_score(SIDES, told, average="macro", zero_division=0))


@pytest.mark.parametrize("workers", [0, 4])
def test_a_processor_that_gives_each_image_its_own_size_is_met_with_a_way_out(tmp_path, bases, workers):
    rows = image_rows(tmp_path, SIDES)
    task = ImageClassification().learn(rows, [])
    _, processor = seeing("tiny-vit", bases, task)
    processor.do_resize = False
    with pytest.raises(DataError, match=r"of this image and .* of another one; --set task\.image_size=") as caught:
        encode_all(
            rows, task.encoder(processor, OPTIONS), source="", format_name="", max_length=1, workers=workers
        )  # fmt: skip
    assert "7 of 8 rows" in str(caught.value)  # all but those of the size that came first
    sized = task.configure({"image_size": 32})
    assert sized.labels == task.labels
    encode = sized.encoder(processor, OPTIONS)
    assert sized.collate([s for r in rows for s in encode(r).samples], processor)["pixel_values"].shape[-2:] == (32, 32)


def test_a_cap_on_pixels_holds_for_an_image_that_an_earlier_run_has_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_open", {"cache": cache.Cache(tmp_path / "cache", 2**20)})
    (row,) = image_rows(tmp_path, ["cat"])
    _images.find_image(row, OPTIONS)
    with pytest.raises(ValueError, match=r"40 x 30 = 1,200 pixels, allowed 1,000"):
        _images.find_image(row, EncodeOptions(max_pixels=1000))


def test_what_is_no_image_processor_is_refused():
    with pytest.raises(ArtifactError, match=r"dict is no image processor") as caught:
        ImageClassification().check_processor({})
    assert "preprocessor_config.json" in str(caught.value)


def test_arrays_bytes_and_paths_of_one_image_give_the_same_pixels(tmp_path, bases):
    task, _, _, processor = made(tmp_path, bases)
    path = write_noise(tmp_path / "one.png", 3)
    array = np.asarray(Image.open(path).convert("RGB"))
    forms = ["one.png", path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, array, Image.open(path)]
    (row,) = image_rows(tmp_path, ["cat"])
    encode = task.encoder(processor, OPTIONS)
    samples = [encode(replace(row, fields={"image": f, "label": "cat"})).samples[0] for f in forms]
    pixels = task.collate(samples, processor)["pixel_values"]
    assert all(torch.equal(p, pixels[0]) for p in pixels)


@pytest.mark.parametrize(("option", "message"), [
    ({"image_size": 0}, r"task\.image_size: must be above 0"),
    ({"image_size": [8, 0]}, r"task\.image_size: must be above 0"),
    ({"augment": {"flipp": 1}}, r"task\.augment\.flipp"),
    ({"augment": {"flip": 2}}, r"task\.augment\.flip: .*less than or equal to 1"),
    ({"imagesize": 32}, r"no such option; did you mean 'image_size'"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(option, message):
    with pytest.raises(UsageError, match=message):
        ImageClassification().configure(option)
