"""Load a finished run: its adapter on its base, the base checked against the one of training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_ft import exports
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import golden
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import Base, load_processor, pick_device, stored_dtype
from lora_ft.recipe import Recipe, load_recipe
from lora_ft.records import (
    EncodeOptions,
    Listener,
    Silent,
)
from lora_ft.registry import TASKS, Task
from lora_ft.runs import Run
from lora_ft_adapters import AdapterError, load_adapter

from .prepare import base_spec, encode_options, source_of
from .probing import Runnable, check_record, has_probes, probe_inputs
from .ready import as_merged, fit_processor, open_base
from .rows import Given

FILES = "files_fingerprint"  # in run.json: of a base that was quantised, what its files held


@dataclass(frozen=True)
class Loaded:
    """A run's adapter on its base.

    Attributes:
        model: PeftModel in evaluation mode; `model.disable_adapter()` gives the base.
        processor: tokenizer or processor.
        recipe: of the run.
        task: of the recipe.
        encode: how rows became tokens in training.
        run: the run.
        dtype: of the base here.
        given: what the caller had in memory.
    """

    model: Any
    processor: Any
    recipe: Recipe
    task: Task
    encode: EncodeOptions
    run: Run
    dtype: str
    given: Given = field(default_factory=Given)


def load(
    run: Run | str | Path,
    *,
    dtype: str | None = None,
    quantised: bool = True,
    listener: Listener | None = None,
    given: Given | None = None,
) -> Loaded:
    """The adapter of a finished run on its base, the base checked against the one it was trained on.

    Args:
        run: the run or its folder; of a run with stages, its last one counts.
        dtype: name of a torch dtype; default that of training.
        quantised: whether a base that was quantised in training is so here too.
        listener: hears what takes long.
        given: the model that the run was trained with, where it was one in memory; whether code may run.

    Raises:
        ArtifactError: the run is not finished, or its base is not the one it was trained on.
    """
    listener, given = listener or Silent(), given or Given()
    run = Run.of(run).final
    facts = run.facts
    if not (run.adapter / "adapter_config.json").is_file():
        raise ArtifactError(
            f"this run has no adapter yet; its status is {facts.get('status')!r}",
            where=str(run.path),
            fix=f"lora-ft train --resume --out {run.path}",
        )
    recipe = load_recipe([run.recipe]).recipe
    if "model" in facts.get("in_memory", ()) and given.model is None:
        fix = "lora_ft.load(run, given=lora_ft.Given(model=THE_SAME_MODULE))"
        raise UsageError("this run was trained on a module in memory", fix=fix)
    task = TASKS.get(recipe.task.type).configure(recipe.task.options()).recall(facts.get("task_facts", {}))
    dtype = dtype or facts["dtype"]
    opened = _open(recipe, task, dtype, listener, quantised=quantised, given=given)
    same_form = quantised or run.facts["quant"] == "none"
    check_base(opened, facts, recipe.model, quantised=same_form)
    check_record(run)
    options = encode_options(recipe, task, recipe.model, facts["encode"]["max_length"])
    processor = load_processor(str(run.adapter), task.processor_class) if task.auto_class else None
    fit_processor(opened.model, task, processor, grow=bool(recipe.data.add_tokens))
    try:
        model = load_adapter(opened.model, run.adapter)
        if quantised:
            as_merged(recipe, model)
    except AdapterError as error:
        raise ArtifactError(str(error), where=str(run.adapter)) from error
    golden.check_template(run.adapter, processor)
    loaded = Loaded(model, processor, recipe, task, options, run, dtype, given)
    form = golden.Form.ROUNDED if same_form else golden.Form.REQUANTISED
    prove(loaded, model, golden.Form.SAME if same_form and dtype == facts["dtype"] else form, listener)
    return loaded


def check_base(base: Base, facts: Mapping[str, Any], where: str, *, quantised: bool) -> None:
    """Refuse a base that is not the one of training.

    Args:
        base: as it is loaded here.
        facts: of the run.
        where: what the user calls it.
        quantised: whether it is in the quantisation of training; else it is held against what its files held then.
    """
    wanted = facts["fingerprint"] if quantised else facts.get(FILES)
    if wanted and fingerprint(base.model, base.fresh, getattr(torch, facts["dtype"])) != wanted:
        raise other_base(where)


def other_base(where: str) -> ArtifactError:
    """The error for an adapter on another base."""
    return ArtifactError(
        "the base model is not the one this adapter was trained on: names, shapes or values differ",
        where=where,
        fix="use the same files; if the model on the hub has changed, pin the old revision in a local folder",
    )


def prove(known: Runnable, model: Any, form: golden.Form, listener: Listener) -> dict[str, float]:
    """The answers to the run's probe inputs, held against those at the end of training.

    Args:
        known: the run.
        model: its adapter on its base, read back.
        form: its dtype and quantisation beside those of training.
        listener: hears when there is nothing to hold them against.

    Returns:
        What `golden.check_golden` measured; {} where nothing could be compared.

    Raises:
        ArtifactError: base or adapter answer otherwise.
    """
    if not has_probes(known.run.adapter):
        return {}
    inputs, is_golden = probe_inputs(known, model, listener)
    probes = exports.answers(model, inputs, known.task.outputs)
    if not is_golden:
        return {}
    kind = next(model.parameters()).device.type
    if form is golden.Form.SAME and kind != golden.read_facts(known.run.adapter).get("device"):
        form = golden.Form.ROUNDED
    return golden.check_golden(known.run.adapter, probes, form)


def _open(recipe: Recipe, task: Task, dtype: str, listener: Listener, *, quantised: bool, given: Given) -> Base:
    spec = base_spec(recipe, task, source_of(recipe, task, listener), given)
    return open_base(recipe, spec, getattr(torch, dtype), pick_device(), quantised=quantised, model=given.model)


def plain_base(loaded: Loaded, listener: Listener, quantised: bool) -> Any:
    """The base once more, as the adapter found it."""
    opened = _open(loaded.recipe, loaded.task, loaded.dtype, listener, quantised=quantised, given=loaded.given)
    fit_processor(opened.model, loaded.task, loaded.processor, grow=bool(loaded.recipe.data.add_tokens))
    return opened.model


def base_dtype(loaded: Loaded, listener: Listener) -> str:
    """Name of the dtype of the base's own files."""
    if loaded.task.auto_class is None:
        return loaded.dtype
    return stored_dtype(source_of(loaded.recipe, loaded.task, listener))
