"""Object detection: targets, loss and boxes against Transformers' own processors and models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from lora_ft.errors import DataError, DivergedError, UsageError
from lora_ft.models.random_models import tiny_detr, tiny_rt_detr
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from lora_ft.tasks._detection_batch import processed_size

OPTIONS = EncodeOptions()
BOXES = [[[2, 3, 10, 12], [20, 5, 9.5, 20]], [], [[30, 1, 15, 10]], [[5, 5, 8, 8], [1, 1, 4, 30], [9, 20, 20, 9]]]
NAMES = [["cat", "dog"], [], ["dog"], ["cat", "cat", "dog"]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for builder in (tiny_detr, tiny_rt_detr):
        (folder / builder.__name__.rsplit(".", 1)[-1]).mkdir()
        builder.build(folder / builder.__name__.rsplit(".", 1)[-1])
    return folder


@pytest.fixture
def processor(bases):
    return hf.AutoImageProcessor.from_pretrained(bases / "tiny_detr")


def _detr(bases):
    return hf.AutoModelForObjectDetection.from_pretrained(
        bases / "tiny_detr", num_labels=2, ignore_mismatched_sizes=True
    )


def _rt_detr(bases):
    config = hf.AutoConfig.from_pretrained(bases / "tiny_rt_detr", num_labels=2)
    return hf.RTDetrForObjectDetection(config)


def _yolos(bases):
    return hf.YolosForObjectDetection(hf.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[48, 48],
        patch_size=8, num_detection_tokens=5, num_labels=2, use_mid_position_embeddings=False, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def _conditional(bases):
    detr = hf.AutoConfig.from_pretrained(bases / "tiny_detr")
    return hf.ConditionalDetrForObjectDetection(hf.ConditionalDetrConfig(
        use_timm_backbone=False, backbone_config=detr.backbone_config, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=6,
        num_labels=2, dropout=0.0, auxiliary_loss=True,
    ))  # fmt: skip


MODELS = {"detr": _detr, "rt-detr": _rt_detr, "yolos": _yolos, "conditional-detr": _conditional}


def model_of(kind, bases):
    torch.manual_seed(0)
    return MODELS[kind](bases).eval()


def rows(folder, sizes=((48, 40),) * 4):
    rng = np.random.default_rng(0)
    found = []
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        fields = {"image": f"{i}.png", "boxes": BOXES[i], "labels": NAMES[i]}
        found.append(Example(fields, f"rows:{i}", root=str(folder)))
    return found


def task_for(examples, **options):
    return TASKS.get("object-detection").configure(options).learn(examples, [])


def samples_of(task, processor, examples):
    encode = task.encoder(processor, OPTIONS)
    return [encode(e).samples[0] for e in examples]


def test_targets_are_those_of_the_models_own_processor(tmp_path, processor):
    examples = rows(tmp_path)
    examples[2] = Example({**examples[2].fields, "boxes": [[40, -3, 15, 10]]}, "out", root=str(tmp_path))
    task = task_for(examples)
    assert (task.labels, task.boxes_per_picture) == (("cat", "dog"), 1.5)
    assert task.recall(task.facts()) == task
    batch = task.collate(samples_of(task, processor, examples), processor)
    for i, example in enumerate(examples):
        annotations = [
            {"bbox": b, "category_id": task.labels.index(n), "area": 1.0, "iscrowd": 0}
            for b, n in zip(example.fields["boxes"], example.fields["labels"], strict=True)
        ]
        own = processor(
            images=[Image.open(tmp_path / f"{i}.png")], annotations=[{"image_id": 1, "annotations": annotations}],
            return_tensors="pt",
        )  # fmt: skip
        assert torch.equal(batch["pixel_values"][i], own["pixel_values"][0])
        assert torch.equal(batch["labels"][i]["class_labels"], own["labels"][0]["class_labels"])
        assert torch.allclose(batch["labels"][i]["boxes"], own["labels"][0]["boxes"].float(), atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_step_has_the_models_own_loss_and_its_parts_add_up(tmp_path, bases, processor, kind):
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_of(kind, bases)
    step = task.mix(samples_of(task, processor, examples), 1)
    batch = task.collate(step, processor)
    own = dict(batch)
    if kind == "yolos":
        del own["pixel_mask"]
    with torch.no_grad():
        expected = model(**own).loss.item()
        whole = task.loss(model, batch)
        parts = [task.loss(model, task.collate([s], processor)) for s in step]
    assert whole.total.item() / whole.count == pytest.approx(expected, rel=1e-5)
    assert sum(p.count for p in parts) == whole.count == 4
    assert sum(p.total.item() for p in parts) == pytest.approx(whole.total.item(), rel=1e-5)


def test_a_step_without_any_box_has_the_models_own_loss(tmp_path, bases, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_of("detr", bases)
    batch = task.collate(task.mix(samples_of(task, processor, examples)[1:2], 1), processor)
    with torch.no_grad():
        assert task.loss(model, batch).total.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_the_model_keeps_its_own_loss_function(tmp_path, bases, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_of("detr", bases)
    before = model.loss_function
    task.loss(model, task.collate(samples_of(task, processor, examples), processor))
    assert model.loss_function is before
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize("kind", ["detr", "yolos"])
def test_a_picture_has_the_same_boxes_beside_larger_ones(tmp_path, bases, processor, kind):
    examples = rows(tmp_path, sizes=((48, 40), (40, 48), (60, 45), (48, 40)))
    task = task_for(examples)
    model = model_of(kind, bases)
    samples = samples_of(task, processor, examples)
    batch = task.collate(samples, processor)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [48 * 57, 57 * 48, 48 * 64, 48 * 57]
    with torch.no_grad():
        together = task.outputs(model, batch)
        alone = [task.outputs(model, task.collate([s], processor)) for s in samples]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_bfloat16_models_are_matched_in_float32(tmp_path, bases, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    batch = task.collate(samples_of(task, processor, examples), processor)
    frozen = [model_of("detr", bases).to(dtype).requires_grad_(False) for dtype in (torch.float32, torch.bfloat16)]
    losses = [task.loss(model, batch).total.item() for model in frozen]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_weights_that_are_no_numbers_are_a_divergence(tmp_path, bases, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_of("detr", bases)
    with torch.no_grad():
        model.bbox_predictor.layers[-1].bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="boxes are not finite"):
        task.loss(model, task.collate(samples_of(task, processor, examples), processor))


def test_a_loss_that_cannot_be_cut_into_micro_batches_is_refused(tmp_path, bases, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    model = model_of("detr", bases)
    model.loss_type = "DFineForObjectDetection"
    with pytest.raises(UsageError, match="not a sum over pictures"):
        task.loss(model, task.collate(samples_of(task, processor, examples), processor))


@pytest.mark.parametrize("kind", ["tiny_detr", "tiny_rt_detr"])
def test_boxes_are_those_of_the_models_own_processor(tmp_path, bases, kind):
    model = model_of({"tiny_detr": "detr", "tiny_rt_detr": "rt-detr"}[kind], bases)
    processor = hf.AutoImageProcessor.from_pretrained(bases / kind)
    examples = rows(tmp_path)
    task = task_for(examples, threshold=0.0)
    found = list(task.predict(model, processor, examples, PredictOptions(1, 3, OPTIONS)))
    for i, one in enumerate(found):
        inputs = processor(images=[Image.open(tmp_path / f"{i}.png")], return_tensors="pt")
        with torch.no_grad():
            (own,) = processor.post_process_object_detection(model(**inputs), -1.0, target_sizes=[(40, 48)])
        order = own["scores"].argsort(descending=True)
        best = {k: one.details[k][: len(order)] for k in ("scores", "boxes", "labels")}  # RT-DETR's own stop earlier
        assert best["scores"] == pytest.approx(own["scores"][order].tolist(), rel=1e-4)
        corners = own["boxes"][order]
        expected = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        assert torch.allclose(torch.tensor(best["boxes"]), expected, atol=1e-3)
        assert best["labels"] == [task.labels[int(c)] for c in own["labels"][order]]
        assert (one.details["width"], one.details["height"]) == (48, 40)
    assert found[2].reference == "dog at (30, 1, 15, 10)"


def test_predict_gives_boxes_from_the_threshold_on(tmp_path, bases, processor):
    examples = rows(tmp_path)
    task = task_for(examples, threshold=0.4)
    sample = samples_of(task, processor, examples)[0]
    kept = {"found": torch.tensor([[0.5, 0.5, 0.5, 0.25, 0.9, 1.0], [0.5, 0.5, 0.1, 0.1, 0.3, 0.0]])}
    (one,) = task.decode([examples[0]], [[sample]], [[kept]], processor)
    assert one.details["boxes"] == [[12.0, 15.0, 24.0, 10.0]]
    assert one.output == "dog 0.90 at (12, 15, 24, 10)"


def test_crowds_are_judged_but_not_learnt(tmp_path, processor):
    examples = rows(tmp_path)
    crowd = Example({**examples[0].fields, "crowd": [False, True]}, "crowd", root=str(tmp_path))
    task = task_for([crowd, *examples[1:]])
    assert task.boxes_per_picture == 1.25
    (sample,) = samples_of(task, processor, [crowd])
    assert len(task.collate([sample], processor)["labels"][0]["boxes"]) == 1
    perfect = {"found": torch.tensor([[7 / 48, 9 / 40, 10 / 48, 12 / 40, 0.9, 0.0]])}
    assert task.measure([sample], [perfect]).metrics["map"] == pytest.approx(1)


def test_boxes_are_flipped_with_their_picture_in_training_only(tmp_path, processor):
    examples = rows(tmp_path)
    task, plain = task_for(examples, augment={"flip": 1.0}), task_for(examples)
    samples = samples_of(task, processor, examples)
    flipped, straight = task.collate(samples, processor, draw=3), plain.collate(samples, processor, draw=3)
    x = straight["labels"][3]["boxes"][:, 0]
    assert torch.allclose(flipped["labels"][3]["boxes"][:, 0], 1 - x, atol=1e-6)
    assert torch.equal(task.collate(samples, processor)["labels"][3]["boxes"], straight["labels"][3]["boxes"])


def test_augmentation_hangs_on_draw_and_sample_alone(tmp_path, processor):
    examples = rows(tmp_path)
    task = task_for(examples, image_size=48, augment={"crop": [0.3, 0.8], "rotate": 10})
    samples = samples_of(task, processor, examples)
    together, alone = task.collate(samples, processor, draw=7), task.collate(samples[3:], processor, draw=7)
    assert together["pixel_values"].shape[-2:] == (48, 48)
    assert torch.equal(together["pixel_values"][3], alone["pixel_values"][0])
    assert torch.equal(together["labels"][3]["boxes"], alone["labels"][0]["boxes"])
    assert not torch.equal(together["pixel_values"], task.collate(samples, processor, draw=8)["pixel_values"])


@pytest.mark.parametrize(
    ("size", "given"),
    [
        ({"shortest_edge": 48, "longest_edge": 64}, (33, 70)), ({"shortest_edge": 30, "longest_edge": 90}, (50, 61)),
        ({"height": 20, "width": 30}, (50, 61)), ({"max_height": 40, "max_width": 40}, (50, 61)),
    ],
)  # fmt: skip
def test_the_cost_of_a_picture_is_that_of_its_processed_size(bases, size, given):
    processor = hf.AutoImageProcessor.from_pretrained(bases / "tiny_detr", size=size, do_pad=False)
    made = processor(images=[Image.new("RGB", given[::-1])], return_tensors="pt")["pixel_values"].shape[-2:]
    assert np.abs(np.subtract(processed_size(*given, size), made)).max() <= 1


def test_bad_rows_are_named(tmp_path, processor):
    examples = rows(tmp_path)
    task = task_for(examples)
    encode = task.encoder(processor, OPTIONS)
    for box in ([60, 2, 5, 5], [2, 40, 5, 5], [-9, 2, 5, 5]):
        with pytest.raises(ValueError, match="outside of the picture of 48 x 40"):
            encode(Example({"image": "0.png", "boxes": [box], "labels": ["cat"]}, "x", root=str(tmp_path)))
    with pytest.raises(DataError, match="the row has no boxes"):
        task.learn([Example({"image": "0.png"}, "x", root=str(tmp_path))], [])
    with pytest.raises(DataError, match="in no training row"):
        task.learn(examples, [Example({"image": "0.png", "boxes": [[1, 1, 2, 2]], "labels": ["cow"]}, "h")])
    assert encode(examples[1]).samples[0].labelled == 1  # a picture without boxes is learnt from


def test_a_perfect_answer_of_queries_is_kept_whole():
    task = TASKS.get("object-detection").configure({"labels": ["a", "b"]}).learn([_row_of(["a"])], [])
    logits = torch.tensor([[[9.0, 0, 0], [0, 0, 9.0]]])
    answer = SimpleNamespace(logits=logits, pred_boxes=torch.rand(1, 2, 4))
    found = task.keep(answer, {})["found"][0]
    assert found[0, 4] == pytest.approx(1, abs=1e-3)
    assert found[0, 5] == 0
    assert found[1, 4] < 0.01  # "nothing" is no class


def _row_of(labels):
    return Example({"image": "x", "boxes": [[0, 0, 1, 1]] * len(labels), "labels": labels}, "x")
