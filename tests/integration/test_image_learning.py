"""Real learning on images: models pretrained here on the digits 0 to 4, adapted to others; and runs that end alike.

benchmarks/digits.py has the whole table: more methods, targets and seeds.
"""

import os
import shutil
import signal

import pytest
import torch
from transformers import SiglipConfig, SiglipForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import lora_ft
from benchmarks import digits
from lora_ft.errors import ArtifactError, Interrupted, UsageError
from lora_ft.records import Silent
from tests.integration.runs import adapter, records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits.write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return {name: digits.pretrain(name, folder) for name in digits.MODELS}


# Accuracy of LoRA on new digits and on inverted ones, and how far a head alone stays behind on the latter.
REACHED = {"tiny-resnet": (0.95, 0.90, 0.02), "tiny-vit": (0.80, 0.60, 0.15)}


@pytest.mark.parametrize("model", digits.MODELS)
def test_digits_that_were_never_seen_are_learnt_and_inverted_ones_need_more_than_a_head(model, bases, data, tmp_path):
    found = {
        (target, method): digits.adapted(bases[model], method, data[target], tmp_path / f"{target}-{method}")
        for target, method in (("new digits", "lora"), ("inverted", "head"), ("inverted", "lora"))
    }
    new, inverted, ahead = REACHED[model]
    assert all(row["before"] < 0.45 for row in found.values())  # a new head knows nothing
    assert found["new digits", "lora"]["after"] > new
    assert found["inverted", "lora"]["after"] > inverted
    assert found["inverted", "lora"]["after"] > found["inverted", "head"]["after"] + ahead
    assert found["inverted", "head"]["trainable"] < found["inverted", "lora"]["trainable"] / 10


SHAKEN = {"crop": [0.5, 1.0], "rotate": 10, "brightness": 0.3, "erase": 0.3, "mixup": 0.4, "cutmix": 0.4}


def shaken(bases, data, **changes):
    return {
        "model": str(bases["tiny-resnet"]), "task": {"type": "image-classification", "augment": SHAKEN},
        "data": {"train": data["new digits"][0], "eval": data["new digits"][1], **changes},
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.1},
        "train": {"steps": 8, "batch_size": 16, "learning_rate": 5e-3, "dtype": "float32", "save_every": 2},
    }  # fmt: skip


def same(one, other) -> bool:
    a, b = adapter(one.adapter), adapter(other.adapter)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class StopsAt(Silent):
    """Ends the run after a step, as a cluster would."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, record):
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_workers_cache_and_an_interruption_leave_no_trace_in_a_run_with_augmentation(bases, data, tmp_path):
    whole = lora_ft.train(shaken(bases, data, workers=0, cache_gb=0), out=tmp_path / "whole")
    threads = lora_ft.train(shaken(bases, data, workers=2), out=tmp_path / "threads")
    assert same(whole, threads)
    recipe = shaken(bases, data, workers=2)
    with pytest.raises(Interrupted):
        lora_ft.train(recipe, out=tmp_path / "cut", listener=StopsAt(3))
    assert same(whole, lora_ft.train(recipe, out=tmp_path / "cut", resume=True))
    steps = [[r["loss"] for r in records(run) if "loss" in r] for run in (whole, threads)]
    assert steps[0] == steps[1]
    assert len(set(steps[0])) > 6
    assert 0 <= threads.facts["data_wait_share"] <= 1


def test_augmentation_changes_a_run(bases, data, tmp_path):
    recipe = shaken(bases, data)
    changed = lora_ft.train(recipe, out=tmp_path / "changed")
    recipe["task"] = "image-classification"
    assert not same(changed, lora_ft.train(recipe, out=tmp_path / "plain"))


NOTHING = [
    ({"type": "layers", "target_modules": ["clasifier"]}, "'clasifier' matches no module"),
    ({"type": "layers", "layers_to_transform": [9]}, "layers_to_transform"),
    ({"type": "lora", "target_modules": ["clasifier"]}, "'clasifier' matches no module"),
    ({"type": "lora", "target_modules": ["head.attention.out_proj"]}, "no gradient reaches 2 of 4 adapter tensors"),
]


@pytest.mark.parametrize(("method", "message"), NOTHING)
def test_what_would_train_nothing_is_refused_before_the_first_step(method, message, data, tmp_path):
    """In a notebook, `requires_grad` set on a module or through a wrong name, or a dead branch, says nothing."""
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = SiglipConfig(
        text_config={**vision, "vocab_size": 40}, vision_config={**vision, "image_size": 32, "patch_size": 8}
    )
    torch.manual_seed(0)
    SiglipForImageClassification(config).save_pretrained(tmp_path / "base")  # it never calls its pooling head
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    recipe = {
        "model": str(tmp_path / "base"), "task": "image-classification", "method": method,
        "data": {"train": data["new digits"][0], "eval": data["new digits"][1]}, "train": {"dtype": "float32"},
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        lora_ft.train(recipe, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_folder_without_its_image_processor_is_refused_by_name(bases, data, tmp_path):
    shutil.copytree(bases["tiny-vit"], tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    recipe = {**shaken(bases, data), "model": str(tmp_path / "base")}
    with pytest.raises(ArtifactError) as caught:
        lora_ft.train(recipe, out=tmp_path / "run")
    assert caught.value.exit_code == 4
    assert str(tmp_path / "base") in str(caught.value)
