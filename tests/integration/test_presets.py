"""Every recipe that comes with the package runs to its end; here with tiny random models and a few steps."""

import math

import pytest

import lora_ft
from lora_ft.errors import UsageError
from lora_ft.recipe import load_recipe, preset_names
from lora_ft.registry import TASKS
from lora_ft.runs import Run

SMALL = ["train.steps=2", "eval.generate=2", "eval.max_new_tokens=4", "train.batch_size=4", "train.dtype=float32"]
TINY = {"builtin:minilm-l6": "builtin:tiny-bert"}


def _needed(name, rows) -> list[str]:
    """The data of a preset that is for the user's own."""
    try:
        load_recipe([], [name])
    except UsageError:
        return [f"data.train={rows}"]
    return []


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_runs_to_its_end(name, base_folder, rows_file, tmp_path):
    data = _needed(name, rows_file)
    resolved = load_recipe([], [name], data)
    model = resolved.recipe.model
    at_once = resolved.recipe.train.few_shot  # a head that is fitted at once has no steps to shorten
    settings = [*(s for s in SMALL if not at_once or not s.startswith(("train.steps", "train.batch_size"))), *data]
    if model in TINY or "smollm2" in model:
        settings.append(f"model={TINY.get(model, base_folder)}")
    if name == "text":
        settings += ["data.format=auto", "data.template=none"]
    stages = [f"stages.{i}.train.{s}" for i in range(len(resolved.stages)) for s in ("steps=2", "batch_size=4")]
    run = lora_ft.train(preset=name, overrides=[*settings, *stages], out=tmp_path / "run")
    facts = Run(tmp_path / "run").facts
    assert facts["status"] == "completed"
    for side in ("before", "after"):
        assert run.metrics[side]["loss"] > 0
        assert all(math.isfinite(v) for v in run.metrics[side].values())
    assert (run.final.adapter / "adapter_model.safetensors").is_file()
    assert "comparison" in facts or not resolved.stages


def test_there_is_a_preset_for_what_people_ask_for(rows_file):
    tasks = {load_recipe([], [n], _needed(n, rows_file)).recipe.task.type for n in preset_names()}
    assert tasks >= set(TASKS.discover()) - {"masked-lm", "regression", "multiple-choice"}
