"""Recipes: the schema (one definition per setting), reading them, and the plan that is made from one."""

from nybble.recipe.load import Setting, all_settings, json_schema, load_recipe, save_recipe, within_context
from nybble.recipe.plan import Change, PhasePlan, Plan, StepMemory, in_micro_batches, refusal, shared_among, step_rows
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
    "Change",
    "DataSection",
    "EvaluationSection",
    "LoraSection",
    "ModelSection",
    "PhasePlan",
    "Plan",
    "QuantizationSection",
    "Recipe",
    "Setting",
    "StepMemory",
    "TrainingSection",
    "all_settings",
    "in_micro_batches",
    "json_schema",
    "load_recipe",
    "refusal",
    "save_recipe",
    "shared_among",
    "step_rows",
    "within_context",
]
