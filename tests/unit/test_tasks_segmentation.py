"""Semantic segmentation: masks, loss and metrics against Transformers' processors and scikit-learn."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

from lora_ft.errors import DataError, UsageError
from lora_ft.models.random_models import tiny_segformer
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from lora_ft.tasks._segmentation_metrics import confusion, judge_masks
from tests.tiny_images import placed

OPTIONS = EncodeOptions()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import AutoImageProcessor

    folder = tmp_path_factory.mktemp("segformer")
    tiny_segformer.build(folder)
    return folder, AutoImageProcessor.from_pretrained(folder)


@pytest.fixture
def processor(base):
    return base[1]


def model_for(folder, task):
    from transformers import AutoModelForSemanticSegmentation

    torch.manual_seed(0)
    return AutoModelForSemanticSegmentation.from_pretrained(
        folder, num_labels=len(task.labels), ignore_mismatched_sizes=True
    ).eval()


def rows(folder, numbers=(0, 1, 3, 255), size=(40, 30), count=4):
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        mask = rng.choice(numbers, (size[1] // 2, size[0] // 2)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
        Image.fromarray(mask).save(folder / f"m{i}.png")
        found.append(Example({"image": f"{i}.png", "mask": f"m{i}.png"}, f"rows:{i}", root=str(folder)))
    return found


def task_for(examples, **options):
    return TASKS.get("semantic-segmentation").configure(options).learn(examples, [])


def samples_of(task, processor, examples):
    encode = task.encoder(processor, OPTIONS)
    return placed([encode(e).samples[0] for e in examples])


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(1)
    wanted = rng.choice([0, 1, 2, 255], (6, 8, 9))
    given = rng.integers(0, 3, (6, 8, 9))
    tables = [confusion(torch.tensor(g), torch.tensor(w), 4) for g, w in zip(given, wanted, strict=True)]
    judged = judge_masks(tables, ["a", "b", "c", "never"])
    keep = wanted != 255
    w, g = wanted[keep], given[keep]
    assert judged.metrics["mean_iou"] == pytest.approx(sk.jaccard_score(w, g, average="macro"))
    assert judged.metrics["mean_accuracy"] == pytest.approx(sk.recall_score(w, g, average="macro"))
    assert judged.metrics["pixel_accuracy"] == pytest.approx(sk.accuracy_score(w, g))
    assert judged.tables["confusion_matrix"]["rows"] == sk.confusion_matrix(w, g, labels=range(4)).tolist()
    assert set(judged.tables["iou_of_class"]) == {"a", "b", "c"}


def test_numbers_found_in_masks_become_classes_and_255_none(tmp_path, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    assert task.labels == ("0", "1", "3")
    assert task.recall(task.facts()) == task
    batch = task.collate(samples_of(task, processor, examples), processor)
    file = np.asarray(Image.open(tmp_path / "m2.png"))
    own = processor(
        images=[Image.open(tmp_path / "2.png")], segmentation_maps=[file], return_tensors="pt"
    )  # fmt: skip
    assert torch.equal(batch["pixel_values"][2], own["pixel_values"][0])
    known = torch.full((256,), 255)
    known[[0, 1, 3]] = torch.arange(3)
    assert torch.equal(batch["labels"][2], known[own["labels"][0]])


def test_reduced_labels_are_the_processors(tmp_path, processor):
    examples = rows(tmp_path, numbers=(0, 1, 2, 255))
    task = task_for(examples, labels=["sky", "sea"], reduce_labels=True)
    batch = task.collate(samples_of(task, processor, examples), processor)
    masks = [np.asarray(Image.open(tmp_path / f"m{i}.png")).copy() for i in range(4)]
    assert torch.equal(batch["labels"], torch.stack([_reduced(processor, m) for m in masks]))
    assert task_for(examples, reduce_labels=True).ids == (1, 2)


def _reduced(processor, mask):
    image = Image.fromarray(np.zeros((*mask.shape, 3), np.uint8))
    out = processor(images=[image], segmentation_maps=[mask], do_reduce_labels=True, return_tensors="pt")
    return out["labels"][0]


def test_a_processor_that_reduces_labels_asks_what_the_masks_mean(tmp_path, base):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(base[0], do_reduce_labels=True)
    task = TASKS.get("semantic-segmentation")
    with pytest.raises(UsageError, match="reduce_labels must be true or false"):
        task.check_processor(processor)
    for said in (True, False):
        assert task.configure({"reduce_labels": said}).check_processor(processor) == []
    examples = rows(tmp_path, numbers=(0, 1))
    chosen = task_for(examples, reduce_labels=False)
    assert set(chosen.collate(samples_of(chosen, processor, examples), processor)["labels"].unique().tolist()) == {0, 1}


def test_a_processor_that_cuts_pictures_needs_a_size(base):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(base[0], size={"shortest_edge": 64})
    task = TASKS.get("semantic-segmentation")
    with pytest.raises(UsageError, match="several sizes"):
        task.check_processor(processor)
    assert task.configure({"image_size": [32, 48]}).check_processor(processor) == []


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        ((0, 255), {}, "only the label '0'"),
        ((0, 7), {"labels": ["a", "b"]}, "the number 7, which is no class; classes: 0, 1"),
        ((0, 1, 255), {"labels": ["a", "b"], "ignore_index": None}, "the number 255, which is no class"),
    ],
)
def test_numbers_that_are_no_class_are_named(tmp_path, processor, numbers, options, message):
    examples = rows(tmp_path, numbers=numbers)
    with pytest.raises((DataError, ValueError), match=message):
        samples_of(task_for(examples, **options), processor, examples)


def test_bad_masks_are_named(tmp_path, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "colours.png")
    encode = task.encoder(processor, OPTIONS)
    for name, message in (
        ("small.png", "9 x 7 pixels, its image 40 x 30"), ("colours.png", "mask of colours"), ("m9.png", "no such file")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            encode(Example({"image": "0.png", "mask": name}, "x", root=str(tmp_path)))


def test_binary_masks_of_0_and_255_need_ignore_index_null(tmp_path, processor):
    examples = rows(tmp_path, numbers=(0, 255))
    task = task_for(examples, ignore_index=None)
    assert task.ids == (0, 255)
    assert task.collate(samples_of(task, processor, examples), processor)["labels"].max() == 1


def test_the_loss_counts_pixels_and_is_the_models_own(tmp_path, base):
    folder, processor = base
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_for(folder, task)
    batch = task.collate(samples_of(task, processor, examples), processor)
    batch["labels"][3] = 255  # a picture without any class
    found = task.loss(model, batch)
    assert found.total.item() / found.count == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    parts = [task.loss(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    assert sum(p.count for p in parts) == found.count
    assert sum(p.total.item() for p in parts) == pytest.approx(found.total.item(), rel=1e-5)
    assert parts[3].count == 0
    assert not found.outputs  # in training no table of pixels is made


def test_judged_tables_are_those_of_the_enlarged_logits(tmp_path, base):
    folder, processor = base
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_for(folder, task)
    samples = samples_of(task, processor, examples)
    batch = task.collate(samples, processor)
    with torch.no_grad():
        kept = task.loss(model, batch).outputs["confusion"]
        sizes = [tuple(batch["labels"].shape[-2:])] * 4
        own = processor.post_process_semantic_segmentation(model(batch["pixel_values"]), sizes)
    judged = task.measure(samples, [{"confusion": t} for t in kept]).metrics
    wanted, given = batch["labels"].numpy().ravel(), torch.stack(own).numpy().ravel()
    keep = wanted != 255
    assert judged["pixel_accuracy"] == pytest.approx((wanted == given)[keep].mean())
    assert judged["mean_iou"] == pytest.approx(sk.jaccard_score(wanted[keep], given[keep], average="macro"))


def test_predicted_masks_have_the_pictures_size_and_the_files_numbers(tmp_path, base):
    folder, processor = base
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_for(folder, task)
    asked = [Example({"image": e.fields["image"]}, e.where, root=e.root) for e in examples]
    found = list(task.predict(model, processor, asked, PredictOptions(1, 3, OPTIONS)))
    assert [p.where for p in found] == [e.where for e in examples]
    pixels = processor(images=[Image.open(tmp_path / "3.png")], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        (own,) = processor.post_process_semantic_segmentation(model(pixels), [(30, 40)])
    assert np.array_equal(found[3].details["mask"], np.array([0, 1, 3])[own.numpy()])
    assert found[3].details["mask"].dtype == np.uint8
    assert sum(found[3].details["shares"].values()) == pytest.approx(1)
    assert found[3].reference is None
    assert found[3].output


def test_picture_and_mask_are_flipped_together_in_training_only(tmp_path, processor):
    examples = rows(tmp_path, numbers=(0, 1), size=(64, 64))
    task, plain = task_for(examples, augment={"flip": 1.0}), task_for(examples)
    samples = samples_of(task, processor, examples)
    flipped, straight = task.collate(samples, processor, draw=5), plain.collate(samples, processor, draw=5)
    assert torch.allclose(flipped["pixel_values"], straight["pixel_values"].flip(-1), atol=1e-6)
    assert torch.equal(flipped["labels"], straight["labels"].flip(-1))
    judged = task.collate(samples, processor)
    assert torch.equal(judged["labels"], straight["labels"])


def test_augmentation_hangs_on_draw_and_sample_alone(tmp_path, processor):
    examples = rows(tmp_path, numbers=(0, 1), size=(60, 60))
    task = task_for(examples, augment={"crop": [0.3, 0.9], "rotate": 20, "brightness": 0.3})
    samples = samples_of(task, processor, examples)
    together = task.collate(samples, processor, draw=7)
    alone = task.collate(samples[2:3], processor, draw=7)
    for key in together:
        assert torch.equal(together[key][2], alone[key][0]), key
        assert not torch.equal(together[key], task.collate(samples, processor, draw=8)[key]), key
    assert 255 in together["labels"]  # what a turned picture uncovers has no class


def test_mixing_of_pictures_is_refused():
    with pytest.raises(UsageError, match="image-classification"):
        TASKS.get("semantic-segmentation").configure({"augment": {"mixup": 0.2}})
