"""How a training ends: the final adapter written and proved, the run closed."""

import shutil
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from lora_ft import runs
from lora_ft.errors import ArtifactError
from lora_ft.exports import write_probes
from lora_ft.recipe import Recipe
from lora_ft.records import Plan
from lora_ft.report import model_card, public_name
from lora_ft.runs import Run
from lora_ft.training import checkpoint, loop
from lora_ft.training.memory import peak_memory_bytes
from lora_ft_adapters import save_adapter, state_of

from .prepare import Prepared

PROBES = 4


def save_final(recipe: Recipe, run: Run, prepared: Prepared, model: Any) -> None:
    """The final adapter, read back and compared bit by bit, with the processor and the probe inputs."""
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
    source = (prepared.held_out or prepared.train)[:PROBES]
    write_probes(staged, prepared.task.probes(source, prepared.processor))
    runs.make_readable(staged)
    shutil.rmtree(run.adapter, ignore_errors=True)
    staged.rename(run.adapter)


def close_run(
    recipe: Recipe, run: Run, plan: Plan, outcome: loop.Outcome, metrics: Mapping[str, Mapping[str, float]],
    wall_s: float,
) -> None:  # fmt: skip
    """Write down how it went, and the model card."""
    run.update(
        {
            "status": runs.STATUS_DONE,
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
