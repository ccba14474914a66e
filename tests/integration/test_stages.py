"""Domain adaptation: stages that stand on each other, compared with the last one alone, and resumed."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_ft
from lora_ft.errors import ArtifactError, DataError, Interrupted, UsageError
from lora_ft.pipeline import train_run
from lora_ft.recipe import load_recipe
from lora_ft.records import Silent
from lora_ft.runs import Run
from lora_ft_adapters import state_of
from tests.integration.runs import adapter

COLOURS = ("red", "green", "blue")
FOLDERS = ("stages/1-domain", "stages/2-task")


class Stops(Silent):
    """Has the process told to stop at a step of a stage; keeps what it is told."""

    def __init__(self, stage="", step=0):
        self.at, self.stage, self.notes = (stage, step), "", []

    def note(self, text):
        self.notes.append(text)
        self.stage = text.split(": ")[1].split(" ")[0] if text.startswith("stage ") else self.stage

    def step(self, record):
        if (self.stage, record["step"]) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Text of a domain, and labelled rows in two files."""
    folder = tmp_path_factory.mktemp("domain")
    texts = [{"text": f"the ball number {i} is {COLOURS[i % 3]} today"} for i in range(24)]
    rows = [{"text": f"{'so ' * (i % 4)}the ball {i} is {COLOURS[i % 3]}", "label": COLOURS[i % 3]} for i in range(60)]
    for name, kept in (("text", texts), ("train", rows[:24]), ("held", rows[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    return folder


def staged(data: Path | str, name: str = "", **last) -> dict:
    """A recipe of two short stages."""
    where = (lambda n: str(Path(data) / f"{n}.jsonl")) if data else (lambda n: f"{n}.jsonl")
    return {
        "model": "builtin:tiny-bert", "method": {"type": "lora", "r": 4},
        "data": {"max_length": 32},
        "train": {"steps": 3, "batch_size": 8, "learning_rate": 5e-3, "dtype": "float32"},
        "stages": [
            {"name": "domain", "task": "masked-lm", "data": {"train": where("text"), "eval": None}},
            {
                "name": "task", "task": "text-classification", "data": {"train": where("train"), "eval": where("held")},
                "train": {"learning_rate": 1e-2, "steps": 4}, **last,
            },
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def same(data, tmp_path_factory):
    """A finished run whose second stage goes on with the adapter; its notes, and that adapter at its start."""
    begun, listener, real = {}, Stops(), train_run.start_from

    def spied(model, *rest):
        real(model, *rest)
        begun.update({k: v.clone() for k, v in state_of(model).items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run, "start_from", spied)
        run = lora_ft.train(staged(data), out=tmp_path_factory.mktemp("same") / "run", listener=listener)
    return run, listener.notes, begun


@pytest.fixture(scope="module")
def new(data, tmp_path_factory):
    """A finished run whose second stage has an adapter of its own on the merged base."""
    return lora_ft.train(
        {**staged(data, adapter="new", method={"type": "lora", "r": 2}), "baseline": False},
        out=tmp_path_factory.mktemp("new") / "run",
    )


def test_the_second_stage_begins_where_the_first_ended(same):
    run, notes, begun = same
    before = adapter(run.path / "stages/1-domain/adapter")
    inside = [k for k in before if ".encoder.layer." in k]
    assert len(inside) == 3 * 6 * 2  # blocks, their linear layers, A and B
    assert all(torch.equal(begun[k], before[k]) for k in inside)
    assert {k for k in begun if ".encoder.layer." in k} == set(inside)
    after = adapter(run.path / "stages/2-task/adapter")
    assert any(not torch.equal(after[k], before[k]) for k in inside)
    assert {k for k in before if k not in begun} == {k for k in before if ".cls.predictions." in k}
    assert any(f"{len(inside)} of {len(begun)} tensors" in n and "pooler" in n and "2 outside" in n for n in notes)


def test_a_second_adapter_stands_on_the_first_merged(new, data, tmp_path):
    merged = new.path / "stages/1-domain/merged"
    last = load_recipe([new.final.path / "recipe.resolved.yaml"]).recipe
    assert (last.model, last.start_from) == (str(merged), None)
    assert {v.shape[0] for k, v in adapter(new.final.adapter).items() if "lora_A" in k} == {2}
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    inner = AutoModelForMaskedLM.from_pretrained(merged).bert.encoder.state_dict()
    assert new.final == Run(new.path / "stages/2-task")
    assert lora_ft.predict(new, str(data / "held.jsonl"), tmp_path / "out.jsonl") == 36
    judged = lora_ft.evaluate_run(new)[0]
    assert judged["after"]["loss"] == pytest.approx(new.metrics["after"]["loss"], rel=1e-4)
    assert lora_ft.merge(new, tmp_path / "merged", dtype="float32")["max_difference"] < 1e-4
    outer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").bert.encoder.state_dict()
    key = "layer.0.attention.self.query.weight"
    assert torch.linalg.matrix_rank((outer[key] - inner[key]).double(), atol=1e-5) == 2


def test_the_comparison_is_that_of_the_predictions_of_both(same, data, tmp_path):
    run, _, _ = same
    found = run.facts["comparison"]
    alone = Run(run.path / "stages/baseline")
    assert "started from" not in (alone.path / "recipe.resolved.yaml").read_text()
    right = []
    for n, one in enumerate((alone, run)):
        lora_ft.predict(one, str(data / "held.jsonl"), tmp_path / f"{n}.jsonl")
        rows = [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()]
        right.append(np.array([r["output"] == r["reference"] for r in rows]))
    assert found["without"] == alone.metrics["after"]
    assert found["with"] == run.final.metrics["after"] == run.metrics["after"]
    assert (found["without"]["accuracy"], found["with"]["accuracy"]) == tuple(r.mean() for r in right)
    assert (found["gained"], found["lost"]) == (int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum()))
    assert found["gained"] + found["lost"] > 3  # else the figures below would be zero
    deltas = right[1].astype(float) - right[0]
    assert found["difference"] == pytest.approx(deltas.mean())
    draws = np.random.default_rng(0).choice(deltas, (4000, len(deltas))).mean(1)
    assert found["interval_95"] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.04)


def test_what_a_stage_had_no_use_for_is_there_for_the_next(new, data, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from lora_ft.models.resolve import resolve

    base, merged = resolve("builtin:tiny-bert", lambda _: None), new.path / "stages/1-domain/merged"
    wanted = AutoModelForSequenceClassification.from_pretrained(base).bert.pooler.dense.weight
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(merged).bert.pooler.dense.weight, wanted)
    assert new.final.facts["fresh"] == ["classifier"]
    few = staged(data, adapter="new", method="head")
    few["stages"][0]["train"], few["stages"][1]["train"] = few.pop("train"), {"few_shot": True, "dtype": "float32"}
    run = lora_ft.train({**few, "baseline": False}, out=tmp_path / "run")
    assert run.final.facts["fresh"] == ["classifier"]
    assert run.metrics["after"]["accuracy"] > run.metrics["before"]["accuracy"]


def test_a_stage_that_died_before_its_first_checkpoint_is_begun_anew(new, data, tmp_path):
    class Dies(Stops):
        def step(self, record):
            if self.stage == "task":
                raise RuntimeError("out of luck")

    recipe = {**staged(data, adapter="new", method={"type": "lora", "r": 2}), "baseline": False}
    with pytest.raises(RuntimeError, match="out of luck"):
        lora_ft.train(recipe, out=tmp_path / "run", listener=Dies())
    assert [Run(tmp_path / "run" / f).facts["status"] for f in (".", *FOLDERS)] == ["failed", "completed", "failed"]
    listener = Stops()
    run = lora_ft.train(recipe, out=tmp_path / "run", resume=True, listener=listener)
    assert not any("merging" in n for n in listener.notes)  # what is merged stays merged
    first, second = adapter(new.final.adapter), adapter(run.final.adapter)
    assert all(torch.equal(second[k], v) for k, v in first.items())


def test_no_baseline_is_trained_where_none_is_wanted(new):
    assert "comparison" not in new.facts
    assert not (new.path / "stages/baseline").exists()
    assert new.facts["status"] == "completed"


def test_an_interrupted_run_goes_on_in_its_stage_and_ends_the_same(same, data, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(data)  # the recipe's paths are relative; the run is resumed from another folder
    out = tmp_path / "run"
    with pytest.raises(Interrupted) as caught:
        lora_ft.train(staged(""), out=out, listener=Stops("task", 2))
    assert caught.value.exit_code == 75
    assert caught.value.fix == f"lora-ft train --resume --out {out}"
    assert [Run(p).facts["status"] for p in (out, *(out / f for f in FOLDERS))] == [
        "interrupted", "completed", "interrupted",
    ]  # fmt: skip
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    kept = out / FOLDERS[0]
    before = {p: p.stat().st_mtime_ns for p in kept.rglob("*") if p.is_file() and not p.name.startswith(".lock")}
    code, printed, err = cli("train", "--resume", "--out", out, "--json")
    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert json.loads(printed)["comparison"] == same[0].facts["comparison"] == Run(out).facts["comparison"]
    for folder in (*FOLDERS, "stages/baseline"):
        whole, resumed = adapter(same[0].path / folder / "adapter"), adapter(out / folder / "adapter")
        assert all(torch.equal(resumed[k], v) for k, v in whole.items()), folder
    assert load_recipe([out / "recipe.resolved.yaml"]).values["stages"][0]["data"]["train"] == str(data / "text.jsonl")
    assert "alone, and after the others" in err.replace("\n", " ")


def test_a_finished_or_changed_run_is_not_mixed_with_another(same, data):
    run, _, _ = same
    for change in ({"seed": 1}, {"baseline": False}):
        with pytest.raises(ArtifactError, match="started with another recipe") as caught:
            lora_ft.train({**staged(data), **change}, out=run.path, resume=True)
        assert caught.value.exit_code == 4
    changed = staged(data)
    changed["stages"][1]["train"]["learning_rate"] = 2e-3
    with pytest.raises(ArtifactError, match="started with another recipe"):
        lora_ft.train(changed, out=run.path, resume=True)
    with pytest.raises(UsageError, match="in use: a run with status 'completed'") as caught:
        lora_ft.train(staged(data), out=run.path)
    assert caught.value.exit_code == 2


def test_what_is_wrong_with_the_last_stage_is_found_before_the_first(data, tmp_path):
    late = staged(data)
    late["stages"][1]["data"]["train"] = str(data / "trian.jsonl")
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        lora_ft.train(late, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other = [
        (staged(data, method={"type": "lora", "r": 8}), "method.r: 8"),
        (staged(data, method={"type": "dora", "r": 4}), "method: dora"),
        (staged(data, model="elsewhere"), "model: elsewhere"),
        (staged(data, start_from="elsewhere"), "start_from: elsewhere"),
    ]
    for recipe, what in other:
        with pytest.raises(UsageError, match=f"task has {what}, unlike domain"):
            lora_ft.train(recipe, out=tmp_path / "run")
    added = staged(data)
    added["stages"][1]["data"]["add_tokens"] = ["<new>"]
    with pytest.raises(UsageError, match=r"data.add_tokens: \('<new>',\)"):
        lora_ft.train(added, out=tmp_path / "run")
    with pytest.raises(UsageError, match="in memory would be those of every stage"):
        lora_ft.train(staged(data), out=tmp_path / "run", eval_data=[{"text": "a", "label": "red"}])


def test_a_dry_run_checks_every_stage_and_trains_nothing(data, cli):
    from lora_ft.recipe import write_yaml

    Path("r.yaml").write_text(write_yaml(staged(data), {}))
    code, out, err = cli("train", "r.yaml", "--dry-run", "--json", "--set", "stages.1.train.steps=5")
    assert code == 0, err
    plan = json.loads(out)
    assert [(s["format"], s["steps"]) for s in plan["stages"]] == [("text", 3), ("labelled_text", 5)]
    assert all(0 < s["trainable_parameters"] < s["total_parameters"] for s in plan["stages"])
    code, out, _ = cli("train", "r.yaml", "--dry-run")
    assert code == 0
    assert out.count("dry run: nothing was trained") == 2
    code, _, err = cli("train", "r.yaml", "--dry-run", "--set", "stages.1.data.train=none.jsonl")
    assert code == 3
    assert not list(Path().glob("runs*"))
    code, _, err = cli("train", "r.yaml", "--dry-run", "--set", "stages.1.method.r=9")
    assert (code, "method.r: 9, unlike domain" in err) == (2, True)


def test_raw_text_and_then_chats_for_a_model_that_writes(base_folder, rows_file, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"number {i} " * 4}) + "\n" for i in range(16)))
    chats = [
        {"messages": [{"role": "user", "content": f"say {i % 3}"}, {"role": "assistant", "content": str(i % 3)}]}
        for i in range(16)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    recipe = {
        "model": str(base_folder), "method": {"type": "lora", "r": 4}, "baseline": False,
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 5e-3, "dtype": "float32"},
        "eval": {"generate": 4, "max_new_tokens": 4}, "data": {"eval": "25%", "max_length": 128},
        "stages": [
            {"data": {"train": str(tmp_path / "text.jsonl")}},
            {"data": {"train": str(tmp_path / "chats.jsonl")}},
            {"data": {"train": str(rows_file)}, "adapter": "new"},
            {"data": {"train": str(rows_file)}, "train": {"learning_rate": 1e-3}},
        ],
    }  # fmt: skip
    listener = Stops()
    run = lora_ft.train(recipe, out=tmp_path / "run", listener=listener)
    recipes = [load_recipe([run.path / f"stages/{n}-stage{n}/recipe.resolved.yaml"]).recipe for n in range(1, 5)]
    merged = str(run.path / "stages/2-stage2/merged")
    assert [r.model for r in recipes] == [str(base_folder)] * 2 + [
        merged
    ] * 2  # same base as the adapter it goes on with
    assert [bool(r.start_from) for r in recipes] == [False, True, False, True]
    assert any("28 of 28 tensors" in n for n in listener.notes)
    assert lora_ft.load(run).run.path.name == "4-stage4"
