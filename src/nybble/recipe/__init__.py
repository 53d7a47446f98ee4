"""Recipes: the schema (one definition per setting), reading them, and the plan that is made from one."""

from nybble.recipe.load import Setting, all_settings, json_schema, load_recipe, save_recipe
from nybble.recipe.plan import Plan
from nybble.recipe.schema import (
    DataSection,
    EvaluationSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
    Recipe,
    TrainingSection,
)

__all__ = [
    "DataSection",
    "EvaluationSection",
    "LoraSection",
    "ModelSection",
    "Plan",
    "QuantizationSection",
    "Recipe",
    "Setting",
    "TrainingSection",
    "all_settings",
    "json_schema",
    "load_recipe",
    "save_recipe",
]
