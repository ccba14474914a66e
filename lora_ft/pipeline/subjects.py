"""What an export format may ask of an adapter before any weight is read."""

from typing import Any

from lora_ft.artifact import Subject
from lora_ft.recipe import Recipe
from lora_ft.records import Silent
from lora_ft.registry import Task
from lora_ft_adapters.apply import read_config
from lora_ft_adapters.registry import corrects_quantisation

from .on_base import Opened
from .prepare import base_spec, source_of
from .ready import fit_processor
from .rows import Given


def subject_of(opened: Opened) -> Subject:
    """What a format may ask of the run's adapter before any weight is read."""
    return subject(opened.recipe, opened.task, opened.processor, read_config(opened.run.adapter), opened.given)


def subject(recipe: Recipe, task: Task, processor: Any, config: Any, given: Given, source: str = "") -> Subject:
    """The same before training.

    Args:
        recipe, task, processor, given: of the run.
        config: of PEFT.
        source: where the base's files are, if that is known.
    """
    model: Any = given.model
    if model is None:
        model = base_spec(recipe, task, source or source_of(recipe, task, Silent()), given).skeleton()
        if task.auto_class is not None:
            model.tie_weights()
            fit_processor(model, task, processor, grow=bool(recipe.data.add_tokens))
    options = getattr(task, "options", None)
    return Subject(
        task.name, task.auto_class, recipe.method.type, config, model, bool(recipe.data.add_tokens), options,
        processor, corrects_quantisation(recipe.method.type, recipe.method.options()),
    )  # fmt: skip
