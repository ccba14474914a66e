"""Runs on images and sounds: threads and interruptions change nothing, and bad files are named before training."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

import lora_ft
from lora_ft.errors import ArtifactError, DataError, Interrupted
from lora_ft.records import Silent
from tests.cases.image_classification import files

AUGMENT = {"crop": [0.5, 1.0], "flip": 0.5, "rotate": 10, "brightness": 0.3, "hue": 0.1, "erase": 0.5, "mixup": 0.4}


class Stops(Silent):
    """Sends SIGTERM in the second step."""

    def step(self, record):
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    files(folder)
    rows = [{"image": f"{i}.png", "label": ["red", "green", "blue"][i % 3]} for i in range(36)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "model": "builtin:tiny-vit", "task": {"type": "image-classification", "augment": AUGMENT},
        "data": {"train": str(folder / "rows.jsonl"), "eval": "25%"}, "method": {"type": "lora", "r": 4},
        "train": {"steps": 6, "batch_size": 8, "learning_rate": 5e-3, "dtype": "float32", "save_every": 1,
                  "tokens_per_micro_batch": 12},
    }  # fmt: skip


def state(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_augmentation_is_the_same_with_no_thread_two_threads_and_after_an_interruption(recipe, tmp_path):
    plain = lora_ft.train(recipe, overrides=["data.workers=0"], out=tmp_path / "plain")
    threads = lora_ft.train(recipe, overrides=["data.workers=2"], out=tmp_path / "threads")
    with pytest.raises(Interrupted):
        lora_ft.train(recipe, overrides=["data.workers=2"], out=tmp_path / "cut", listener=Stops())
    resumed = lora_ft.train(recipe, overrides=["data.workers=2"], out=tmp_path / "cut", resume=True)
    assert same(state(plain), state(threads))
    assert same(state(plain), state(resumed))
    assert plain.metrics == threads.metrics == resumed.metrics
    assert 0 <= threads.facts["data_wait_share"] <= 1


def test_data_that_moved_gives_the_same_run(recipe, tmp_path):
    plain = lora_ft.train(recipe, out=tmp_path / "plain")
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    recipe["data"]["train"] = str(tmp_path / "elsewhere" / "rows.jsonl")
    assert same(state(plain), state(lora_ft.train(recipe, out=tmp_path / "moved")))


def test_without_augmentation_the_run_is_another_one(recipe, tmp_path):
    plain = lora_ft.train(recipe, out=tmp_path / "one")
    recipe["task"] = "image-classification"
    assert not same(state(plain), state(lora_ft.train(recipe, out=tmp_path / "two")))


def test_a_cache_of_decoded_images_changes_nothing(recipe, tmp_path):
    cached = lora_ft.train(recipe, out=tmp_path / "cached")
    off = lora_ft.train(recipe, overrides=["data.cache_gb=0"], out=tmp_path / "off")
    assert same(state(cached), state(off))


def broken(folder, name):
    path = folder / "7.png"
    path.unlink()
    if name == "corrupt":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 300)
    elif name == "zero-byte":
        path.write_bytes(b"")
    elif name == "giant":
        Image.new("L", (9000, 9000)).save(path)
    elif name == "outside":
        (folder.parent / "other.png").write_bytes((folder / "8.png").read_bytes())
        path.symlink_to(folder.parent / "other.png")


@pytest.mark.parametrize(
    ("name", "says"),
    [("corrupt", "damaged"), ("zero-byte", "0 bytes"), ("giant", "81,000,000 pixels"),
     ("missing", "no such file"), ("outside", "outside of the data's folder")],
)  # fmt: skip
def test_a_bad_image_stops_the_run_before_it_begins_and_is_named_with_its_row(recipe, tmp_path, name, says):
    broken(tmp_path / "images", name)
    with pytest.raises(DataError, match=says) as caught:
        lora_ft.train(recipe, out=tmp_path / "run")
    assert f"{tmp_path / 'images' / 'rows.jsonl'}:8" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [("empty", "empty"), ("text", "no sound that can be read"), ("rate", "8,000 Hz, the model wants 16,000 Hz"),
     ("nan", "NaN"), ("truncated", "truncated")],
)  # fmt: skip
def test_a_bad_sound_is_named_with_its_row(tmp_path, name, says):
    for i in range(8):
        sound = np.sin(np.arange(8000) * (0.05 + 0.1 * (i % 2)))
        soundfile.write(tmp_path / f"{i}.wav", sound, 16000)
    path = tmp_path / "5.wav"
    if name == "empty":
        soundfile.write(path, np.zeros(0), 16000)
    elif name == "text":
        path.write_text("hello")
    elif name == "rate":
        soundfile.write(path, np.zeros(8000), 8000)
    elif name == "nan":
        soundfile.write(path, np.full(8000, np.nan), 16000, subtype="FLOAT")
    else:
        path.write_bytes(path.read_bytes()[:5000])
    rows = [{"audio": f"{i}.wav", "label": ["low", "high"][i % 2]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {
        "model": "builtin:tiny-wav2vec2", "task": "audio-classification",
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": None, "resample": False},
    }  # fmt: skip
    with pytest.raises(DataError, match=says) as caught:
        lora_ft.train(recipe, out=tmp_path / "run")
    assert f"{tmp_path / 'rows.jsonl'}:6" in str(caught.value)


def test_the_command_says_the_row_and_exits_with_3(recipe, tmp_path):
    broken(tmp_path / "images", "zero-byte")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", "from lora_ft.cli import main; main()", "train", str(tmp_path / "recipe.json")]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "rows.jsonl:8" in "".join(done.stderr.split())
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_nothing_is_published_where_there_is_nothing_to_compare_it_by(recipe, tmp_path):
    run = lora_ft.train(recipe, overrides=["train.probe_text=false", "train.steps=2"], out=tmp_path / "run")
    assert lora_ft.merge(run, tmp_path / "merged")["max_difference"] < 1e-4
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(ArtifactError, match="no input to compare") as caught:
        lora_ft.merge(run, tmp_path / "blind")
    assert "data back" in caught.value.fix
    assert not (tmp_path / "blind").exists()
