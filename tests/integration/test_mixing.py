"""Several training sets with weights, and classes in balance, through the whole pipeline."""

import json
import os
import signal
from collections import Counter

import pytest
import torch

import lora_ft
from lora_ft.errors import ArtifactError, Interrupted, UsageError
from lora_ft.recipe import load_recipe
from lora_ft.records import Silent
from lora_ft.training import loop
from tests.integration.runs import adapter

COLOURS = ("red", "green", "blue")


class Stops(Silent):
    def step(self, record):
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def seen(monkeypatch):
    """The samples of each step."""
    steps, real = [], loop.step_gradients

    def spied(job, parameters, step, *rest):
        steps.append(list(step.samples))
        return real(job, parameters, step, *rest)

    monkeypatch.setattr(loop, "step_gradients", spied)
    return steps


@pytest.fixture
def recipe(tmp_path):
    """Two labelled sets, 20 and 10 rows, the second to be drawn four times as often."""
    for name, numbers in (("z", range(20)), ("a", range(20, 30)), ("held", range(30, 36))):
        rows = [{"text": f"ball {i} is {COLOURS[i % 3]}", "label": COLOURS[i % 3]} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "model": "builtin:tiny-bert", "task": "text-classification", "method": {"type": "lora", "r": 2},
        "data": {"train": [{"path": "z.jsonl"}, {"path": "a.jsonl", "weight": 4}], "eval": "held.jsonl"},
        "train": {"epochs": 2, "batch_size": 10, "learning_rate": 1e-3, "dtype": "float32", "save_every": 1},
    }  # fmt: skip


def places(tmp_path, steps):
    return Counter(os.path.relpath(s.source, tmp_path) for samples in steps for s in samples)


def test_an_epoch_draws_the_sets_by_their_weights(recipe, tmp_path, monkeypatch, seen):
    monkeypatch.chdir(tmp_path)
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert [len(s) for s in seen] == [10] * 6  # two epochs as long as both sets together
    for epoch in (seen[:3], seen[3:]):
        assert places(tmp_path, epoch) == {"a.jsonl": 24, "z.jsonl": 6}  # 30 x 4/5 and 30 x 1/5
    rows = Counter(s.where for samples in seen for s in samples)
    of_small = [n for where, n in rows.items() if "a.jsonl" in where]
    assert (len(of_small), min(of_small), max(of_small)) == (10, 4, 5)  # 48 draws of 10 rows, none left out
    assert max(n for where, n in rows.items() if "z.jsonl" in where) == 1  # 12 of 20, none twice
    assert run.facts["rows"] == 30
    kept = load_recipe([run.path / "recipe.resolved.yaml"]).recipe
    wanted = [(str(tmp_path / "z.jsonl"), 1.0), (str(tmp_path / "a.jsonl"), 4.0)]
    assert [(s.path, s.weight) for s in kept.data.train] == wanted
    assert "z.jsonl, a.jsonl, 30 samples" in (run.adapter / "README.md").read_text()


def test_a_resumed_run_draws_on_and_other_weights_are_refused(recipe, tmp_path, monkeypatch, seen):
    monkeypatch.chdir(tmp_path)
    whole = lora_ft.train(recipe, out=tmp_path / "whole")
    uninterrupted = [[s.where for s in step] for step in seen]
    seen.clear()
    with pytest.raises(Interrupted):
        lora_ft.train(recipe, out=tmp_path / "run", listener=Stops())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # relative paths of the recipe would name nothing here
    text = (tmp_path / "run/recipe.resolved.yaml").read_text()
    (tmp_path / "other.yaml").write_text(text.replace("weight: 4.0", "weight: 2.0"))
    with pytest.raises(ArtifactError, match="cannot go on") as caught:
        lora_ft.train(tmp_path / "other.yaml", out=tmp_path / "run", resume=True)
    assert "order" in caught.value.why
    run = lora_ft.train(tmp_path / "run/recipe.resolved.yaml", out=tmp_path / "run", resume=True)
    assert [[s.where for s in step] for step in seen] == uninterrupted
    first, second = adapter(whole.adapter), adapter(run.adapter)
    assert all(torch.equal(second[k], v) for k, v in first.items())


def test_balanced_sampling_draws_the_classes_evenly(recipe, tmp_path, monkeypatch, seen):
    monkeypatch.chdir(tmp_path)
    labels = ["rare"] * 3 + ["often"] * 27
    rows = [{"text": f"ball {i} is {label}", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe["data"] = {"train": "uneven.jsonl", "eval": None, "sampling": "balanced"}
    lora_ft.train(recipe, out=tmp_path / "run")
    for epoch in (seen[:3], seen[3:]):
        assert Counter(s.label for samples in epoch for s in samples) == {"rare": 15, "often": 15}
    recipe["data"]["sampling"] = "shuffle"
    seen.clear()
    lora_ft.train(recipe, out=tmp_path / "plain")
    assert Counter(s.label for samples in seen[:3] for s in samples) == {"rare": 3, "often": 27}
    with pytest.raises(ArtifactError, match="cannot go on"):
        lora_ft.train(
            {**recipe, "data": {**recipe["data"], "sampling": "balanced"}}, out=tmp_path / "plain", resume=True
        )


def test_what_cannot_be_mixed_is_refused_before_the_base_is_read(recipe, rows_file, base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_ft.pipeline.train_run.make_ready", lambda *_: pytest.fail("the base was read"))

    def refused(changed):
        for start in (
            lora_ft.pipeline.dry_run,
            lambda r: lora_ft.pipeline.train(r, out=tmp_path / "run", overwrite=True),
        ):
            with pytest.raises(UsageError) as caught:
                start(load_recipe([changed]))
        return caught.value

    both = {**recipe, "data": {**recipe["data"], "sampling": "balanced"}}
    assert "balanced does not go with several training sets" in refused(both).what
    twice = {**recipe, "data": {**recipe["data"], "train": [{"path": "z.jsonl"}, {"path": "./z.jsonl"}]}}
    assert f"names '{tmp_path / 'z.jsonl'}' twice" in refused(twice).what
    small = {**recipe, "data": {**recipe["data"], "train": [{"path": "z.jsonl"}, {"path": "a.jsonl", "weight": 1e-6}]}}
    assert "gets no sample in an epoch of 30" in refused(small).what
    writes = {"model": str(base_folder), "data": {"train": str(rows_file), "sampling": "balanced", "max_length": 128}}
    assert refused(writes).what == "data.sampling: balanced needs classes, and causal-lm rows have none here"
    for bad in ([], [{"path": "z.jsonl", "weight": 0}], [{"weight": 2}]):
        assert refused({**recipe, "data": {"train": bad}}).exit_code == 2
