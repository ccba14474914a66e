"""lora-ft train --dry-run: every check that needs no weights, and what training would do."""

import copy
from typing import Any

from lora_ft.models.load import pick_device
from lora_ft.recipe import Recipe, Resolved
from lora_ft.records import Listener, Silent
from lora_ft.training import few_shot
from lora_ft.training.optim import check_optimizer
from lora_ft_adapters import AdapterError, add_adapter, count_parameters
from lora_ft_adapters.behaviour import behaviour_of

from . import stages
from .prepare import Prepared, planned_steps, prepare, usage
from .ready import check_method, check_quant
from .rows import Given
from .targets import check_target


def check(recipe: Recipe, prepared: Prepared) -> Any:
    """Every check that needs no weights; returns the PEFT config."""
    if recipe.train.few_shot:
        few_shot.check(recipe, prepared.task)
    check_quant(recipe, prepared.base)
    check_optimizer(recipe.train.optimizer, pick_device())
    config = check_method(recipe, prepared, empty=prepared.model)
    check_target(recipe, prepared, config)
    return config


def steps_of(recipe: Recipe, prepared: Prepared) -> tuple[int, int]:
    """(optimizer steps in all, in one epoch); a head that is fitted at once is one step."""
    return (1, 1) if recipe.train.few_shot else planned_steps(recipe, prepared)


def _count(prepared: Prepared, config: Any) -> tuple[int | None, int]:
    """(trainable, total) parameters on a model without weights; None for a method that starts by decomposing them."""
    empty = prepared.base.skeleton() if prepared.model is None else copy.deepcopy(prepared.model).to("meta")
    total = count_parameters(empty)[1]
    try:
        return count_parameters(add_adapter(empty, behaviour_of(config).sketch(config)))
    except AdapterError as error:
        cause = str(error.__cause__)
        if "meta" in cause or isinstance(error.__cause__, NotImplementedError) or "set_data" in cause:
            return None, total
        raise usage(error) from error


def dry_run(resolved: Resolved, listener: Listener | None = None, given: Given | None = None) -> dict[str, Any]:
    """All checks that need no weights, and what training would do; of a recipe with stages, {"stages": [...]}."""
    if resolved.stages:
        stages.check(resolved, given or Given())
        return {"status": "dry-run", "stages": [dry_run(s.resolved, listener, given) for s in resolved.stages]}
    recipe = resolved.recipe
    prepared = prepare(recipe, listener or Silent(), given)
    config = check(recipe, prepared)
    trains, total = _count(prepared, config)
    steps, _ = steps_of(recipe, prepared)
    lengths = [s.length for s in prepared.train]
    return {
        "status": "dry-run",
        "rows": prepared.report.rows,
        "format": prepared.report.format,
        "samples": len(prepared.train),
        "held_out": len(prepared.held_out),
        "tokens_per_epoch": sum(lengths),
        "labelled_tokens": prepared.report.labelled_tokens,
        "longest": max(lengths),
        "steps": steps,
        "trainable_parameters": trains,
        "total_parameters": total,
        "outcomes": dict(prepared.report.outcomes),
        "sample": prepared.report.sample_shown,
    }
