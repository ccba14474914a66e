"""How a training ends: the final adapter written and proved, the run closed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_ft import exports, runs
from lora_ft.errors import ArtifactError
from lora_ft.exports import golden
from lora_ft.models.load import load_processor
from lora_ft.recipe import Recipe
from lora_ft.records import Plan
from lora_ft.report import model_card, public_name
from lora_ft.runs import Run
from lora_ft.training import checkpoint, loop
from lora_ft.training.memory import peak_memory_bytes
from lora_ft_adapters import save_adapter, state_of
from lora_ft_adapters.norms import update_norms

from .prepare import Prepared
from .probing import PROBES


def save_final(recipe: Recipe, run: Run, prepared: Prepared, model: Any) -> dict[str, float]:
    """The final adapter, read back and compared bit by bit, with the processor, the probe inputs and their answers.

    Returns:
        The size of each module's update relative to its weight, where both are known.
    """
    staged = run.path / ".adapter"
    shutil.rmtree(staged, ignore_errors=True)
    save_adapter(model, staged, base=public_name(recipe.model))
    if prepared.processor is not None:
        prepared.processor.save_pretrained(str(staged))
    saved = load_file(staged / checkpoint.ADAPTER)
    wanted = state_of(model)
    same = saved.keys() == wanted.keys() and all(torch.equal(saved[k], v.cpu()) for k, v in wanted.items())
    if not same or not all(bool(t.isfinite().all()) for t in saved.values()):
        raise ArtifactError("the saved adapter differs from the one in memory or is not finite", where=str(staged))
    norms = update_norms(model)
    _write_probes(recipe, run, prepared, model, staged, norms)
    runs.make_readable(staged)
    shutil.rmtree(run.adapter, ignore_errors=True)
    staged.rename(run.adapter)
    return {name: relative for name, (_, relative) in norms.items() if relative is not None}


def _write_probes(
    recipe: Recipe, run: Run, prepared: Prepared, model: Any, folder: Path, norms: Mapping[str, Any]
) -> None:
    source = (prepared.held_out or prepared.train)[: recipe.train.probes]
    inputs = prepared.task.probes(source, prepared.processor)
    was_training = model.training
    probes = exports.answers(model.eval(), inputs, prepared.task.outputs)
    model.train(was_training)
    if recipe.train.probe_text:
        exports.write_probes(folder, inputs)
    facts = {k: run.facts.get(k) for k in ("fingerprint", "dtype", "quant", "versions")}
    device = next(model.parameters()).device.type
    template = (
        golden.template_hash(load_processor(str(folder), prepared.task.processor_class)) if prepared.processor else None
    )
    golden.write_golden(folder, probes, {**facts, "device": device, "template": template, "norms": norms})
    run.update({PROBES: len(probes)})


def close_run(
    recipe: Recipe, run: Run, plan: Plan, outcome: loop.Outcome, metrics: Mapping[str, Mapping[str, float]],
    wall_s: float,
) -> None:  # fmt: skip
    """Write down how it went, and the model card."""
    run.update(
        {
            "status": runs.STATUS_DONE,
            "method": recipe.method.type,
            "metrics": metrics,
            "rows": plan.rows,
            "steps": outcome.progress.step,
            "best_step": outcome.best_step,
            "stopped_early": outcome.stopped_early,
            "trainable_parameters": plan.trainable_parameters,
            "total_parameters": plan.total_parameters,
            "fast_path": plan.fast_path,
            "tokens": outcome.progress.tokens,
            "tokens_per_s": round(outcome.progress.tokens / max(outcome.progress.seconds, 1e-9), 1),
            "train_s": round(outcome.progress.seconds, 2),
            "data_wait_share": round(outcome.progress.data_seconds / max(outcome.progress.seconds, 1e-9), 4),
            "peak_memory_bytes": peak_memory_bytes(),
            "wall_s": round(wall_s, 2),
        }
    )
    runs.write_text(run.adapter / "README.md", model_card(recipe, run.facts, merged=False, figures={}))
