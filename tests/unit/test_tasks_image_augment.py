"""Image classification while training: augmentation and mixing hang on the draw and the sample, and on nothing else."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional

from lora_ft.tasks.image_classification import ImageClassification
from tests.tiny_images import OPTIONS, image_rows, placed, seeing

SIDES = ["cat", "dog", "cat", "cow", "dog", "cat", "cow", "dog"]
SETS = [["cat"], ["cat", "dog"], [], ["cow"], ["dog"], ["cat", "cow"], ["cat"], ["cow", "dog"]]
SHAKEN = {"crop": [0.3, 0.9], "flip": 0.5, "rotate": 20, "brightness": 0.4, "hue": 0.2, "erase": 0.5}
DRAW = 77


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def made(folder, bases, augment, answers=SIDES, key="label", **options):
    """(task, model, samples, processor)"""
    rows = image_rows(folder, answers, key)
    task = ImageClassification().configure({"augment": augment, **options}).learn(rows, [])
    model, processor = seeing("tiny-vit", bases, task)
    encode = task.encoder(processor, OPTIONS)
    return task, model, placed([s for r in rows for s in encode(r).samples]), processor


def pixels(task, samples, processor, draw):
    return task.collate(samples, processor, draw)["pixel_values"]


def test_changes_are_those_of_the_draw_and_the_sample_whoever_is_beside_it_in_whatever_thread(tmp_path, bases):
    task, _, samples, processor = made(tmp_path, bases, SHAKEN)
    whole = pixels(task, samples, processor, DRAW)
    assert torch.equal(pixels(task, samples[::-1], processor, DRAW), whole.flip(0))
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda s: pixels(task, [s], processor, DRAW)[0], samples * 3))
    assert all(torch.equal(a, b) for a, b in zip(alone, [*whole] * 3, strict=True))
    other = pixels(task, samples, processor, DRAW + 1)
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_judging_sees_the_images_as_they_are(tmp_path, bases):
    plain, _, samples, processor = made(tmp_path, bases, {})
    shaken = made(tmp_path, bases, {**SHAKEN, "mixup": 1.0})[0]
    assert torch.equal(pixels(shaken, samples, processor, 0), pixels(plain, samples, processor, 0))
    assert not torch.equal(pixels(shaken, samples, processor, DRAW), pixels(plain, samples, processor, DRAW))
    assert torch.equal(pixels(plain, samples, processor, DRAW), pixels(plain, samples, processor, 0))
    batch = shaken.collate(shaken.mix(samples, DRAW), processor, 0)
    assert torch.equal(batch["labels"], torch.tensor([s.inputs["labels"] for s in samples]))
    assert torch.equal(batch["pixel_values"], pixels(plain, samples, processor, 0))


def test_the_randomness_of_the_process_is_neither_used_nor_moved(tmp_path, bases):
    task, _, samples, processor = made(tmp_path, bases, {**SHAKEN, "mixup": 0.4, "cutmix": 0.4})
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
        found.append(task.collate(task.mix(samples, DRAW), processor, DRAW))
        assert before[0] == random.getstate()
        assert before[1] == np.random.get_state()[1].tolist()
        assert torch.equal(before[2], torch.get_rng_state())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize(("answers", "key"), [(SIDES, "label"), (SETS, "labels")], ids=["single", "multi"])
def test_mixup_blends_pixels_and_labels_by_one_share(tmp_path, bases, answers, key):
    task, _, samples, processor = made(tmp_path, bases, {"mixup": 1.0}, answers, key)
    plain = pixels(task, samples, processor, 0)
    mixed = task.mix(samples, DRAW)
    batch = task.collate(mixed, processor, DRAW)
    own = torch.tensor([s.inputs["labels"] for s in samples])
    own = own if key == "labels" else functional.one_hot(own, 3).float()
    place = {s.inputs["image"].key: i for i, s in enumerate(samples)}
    partners = [place[s.inputs["partner"].key] for s in mixed]
    assert len(set(partners)) > 2
    shares = []
    for i, j in enumerate(partners):
        if i == j:
            assert torch.allclose(batch["pixel_values"][i], plain[i], atol=1e-6)
            continue
        gap = plain[i] - plain[j]
        share = float(((batch["pixel_values"][i] - plain[j]) * gap).sum() / gap.square().sum())
        assert torch.allclose(batch["pixel_values"][i], share * plain[i] + (1 - share) * plain[j], atol=1e-5)
        assert torch.allclose(batch["labels"][i], share * own[i] + (1 - share) * own[j], atol=1e-5)
        shares.append(round(share, 4))
    assert len(set(shares)) == len(shares)
    assert all(0 <= s <= 1 for s in shares)


def test_cutmix_pastes_a_box_whose_share_of_the_pixels_is_the_share_of_the_label(tmp_path, bases):
    task, _, samples, processor = made(tmp_path, bases, {"cutmix": 1.0})
    plain = pixels(task, samples, processor, 0)
    mixed = task.mix(samples, DRAW)
    batch = task.collate(mixed, processor, DRAW)
    place = {s.inputs["image"].key: i for i, s in enumerate(samples)}
    seen = 0
    for i, sample in enumerate(mixed):
        j = place[sample.inputs["partner"].key]
        theirs = (batch["pixel_values"][i] != plain[i]).any(0)
        assert torch.equal(batch["pixel_values"][i][:, theirs], plain[j][:, theirs])
        if SIDES[i] != SIDES[j] and theirs.any():
            rows, columns = theirs.any(1).nonzero(), theirs.any(0).nonzero()
            box = float((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)) / theirs.numel()
            assert float(batch["labels"][i][task.labels.index(SIDES[j])]) == pytest.approx(box, abs=0.02)
            seen += 1
    assert seen >= 2
    assert torch.allclose(batch["labels"].sum(-1), torch.ones(len(samples)))


def test_a_mixed_step_is_the_same_however_it_is_cut(tmp_path, bases):
    augment = {**SHAKEN, "mixup": 0.8, "cutmix": 0.8}
    task, model, samples, processor = made(tmp_path, bases, augment, class_weights={"dog": 3.0})
    mixed = task.mix(samples, DRAW)
    with torch.no_grad():
        whole = task.loss(model, task.collate(mixed, processor, DRAW))
        parts = [task.loss(model, task.collate([s], processor, DRAW)) for s in mixed]
    assert float(whole.total) == pytest.approx(sum(float(p.total) for p in parts), rel=1e-5)
    assert whole.count == pytest.approx(sum(p.count for p in parts), rel=1e-6)
    assert task.mix(samples, DRAW + 1)[0].inputs["partner"] is not None
    assert [s.inputs["partner"].key for s in mixed] != [s.inputs["partner"].key for s in task.mix(samples, DRAW + 1)]


def test_the_loss_of_mixed_labels_follows_the_formula():
    rows = [["cat", 0.25, 0.75, 0.0], ["dog", 0.0, 0.4, 0.6]]
    shares = torch.tensor([r[1:] for r in rows])
    logits = torch.tensor([[0.3, -1.2, 2.0], [1.5, 0.1, -0.7]])
    weights, smoothing = torch.tensor([1.0, 4.0, 0.5]).double(), 0.2
    task = ImageClassification(labels=("cat", "cow", "dog"), weights=(1.0, 4.0, 0.5))
    task = task.configure({"label_smoothing_factor": smoothing})
    total, count = task.class_loss(logits, shares)
    smooth = shares.double() * (1 - smoothing) + smoothing / 3
    assert float(total) == pytest.approx(float(-(weights * smooth * logits.double().log_softmax(-1)).sum()), rel=1e-6)
    assert count == pytest.approx(float((shares.double() @ weights).sum()), rel=1e-6)
