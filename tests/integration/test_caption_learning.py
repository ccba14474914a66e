"""A vision-language model that knew nothing describes pictures that it never saw."""

import json

import pytest

import lora_ft
from lora_ft.data.generated import captions_test

pytestmark = pytest.mark.slow

GOAL = 0.8  # share of captions right word for word; a guess is right in 1 of 12


def test_captions_of_new_pictures_are_right_after_training_and_not_before(tmp_path):
    run = lora_ft.train(preset="image-captions", overrides=["train.dtype=float32"], out=tmp_path / "run")
    before, after = run.metrics["before"], run.metrics["after"]
    assert before["exact_match"] == 0
    assert after["exact_match"] >= GOAL
    assert after["perplexity"] < 1.3 < 100 < before["perplexity"]
    assert after["token_accuracy"] > 0.9
    captions_test.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    asked = "".join(json.dumps({"image": r["image"], "question": "Describe the image."}) + "\n" for r in rows)
    (tmp_path / "ask.jsonl").write_text(asked)
    assert lora_ft.predict(run, str(tmp_path / "ask.jsonl"), tmp_path / "out.jsonl", max_new_tokens=8) == len(rows)
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = [t["output"] == r["caption"] for t, r in zip(told, rows, strict=True)]
    assert sum(right) / len(right) == after["exact_match"]
    assert told[0]["images"] == [str(tmp_path / rows[0]["image"])]
