"""The user's file: sections, YAML, presets, merging, validation."""

from ._section import Section
from .load import Resolved, Stage, load_recipe, preset_names
from .sections import DataSection, EvalSection, MethodSection, Recipe, Source, TaskSection, recipe_schema
from .training import TrainSection
from .yaml import write_yaml

__all__ = [
    "DataSection", "EvalSection", "MethodSection", "Recipe", "Resolved", "Section", "Source", "Stage", "TaskSection",
    "TrainSection", "load_recipe", "preset_names", "recipe_schema", "write_yaml",
]  # fmt: skip
