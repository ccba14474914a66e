"""The exported ONNX classifier gives the labels that the adapter gives, read without us and without PEFT."""

import json
import random

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import lora_ft

pytestmark = pytest.mark.slow

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
WORDS = {"glad": ["joy", "love", "sun", "warm", "smile"], "sad": ["rain", "loss", "grey", "cold", "tears"]}
ALL = [*WORDS["glad"], *WORDS["sad"]]
ROWS, BATCH = 200, 16


def rows(count, seed):
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choice(sorted(WORDS))
        words = [draw.choice(WORDS[label] if draw.random() < 0.7 else ALL) for _ in range(draw.randint(1, 12))]
        made.append({"text": " ".join(words), "label": label})
    return made


def write(path, made):
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(path)


def labels_of_graph(folder, texts):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    names = [i.name for i in session.get_inputs()]
    found = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, return_tensors="np")
        logits = session.run(["logits"], {n: batch[n] for n in names})[0]
        found += [config.id2label[int(i)] for i in torch.from_numpy(logits).argmax(-1)]
    return found


def test_onnx_classifier_gives_the_adapters_labels_on_200_rows(tmp_path):
    recipe = {
        "model": "builtin:tiny-bert", "task": "text-classification", "method": {"type": "lora", "r": 4},
        "data": {"train": write(tmp_path / "train.jsonl", rows(96, 1)), "eval": "25%"},
        "train": {"steps": 40, "batch_size": 16, "learning_rate": 5e-3},
    }  # fmt: skip
    run = lora_ft.train(recipe, out=tmp_path / "run")
    asked = rows(ROWS, 3)
    lora_ft.predict(run, write(tmp_path / "asked.jsonl", asked), tmp_path / "answers.jsonl")
    wanted = [json.loads(line)["output"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]

    figures = lora_ft.export(run, tmp_path / "graph", format_name="onnx")

    assert figures["max_difference"] < 1e-3
    assert sorted(set(wanted)) == sorted(WORDS)  # one answer for everything would prove nothing
    assert labels_of_graph(tmp_path / "graph", [r["text"] for r in asked]) == wanted
    assert not list((tmp_path / "graph").glob("*.safetensors"))
