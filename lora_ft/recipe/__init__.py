"""The user's file: sections, YAML, presets, merging, validation."""

from .load import Resolved, load_recipe, preset_names
from .sections import DataSection, EvalSection, MethodSection, Recipe, TrainSection
from .yaml import write_yaml

__all__ = [
    "DataSection", "EvalSection", "MethodSection", "Recipe", "Resolved", "TrainSection", "load_recipe",
    "preset_names", "write_yaml",
]  # fmt: skip
