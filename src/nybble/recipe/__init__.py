"""Recipes: the schema (one definition per setting), reading them, and the plan that is made from one."""

from nybble.recipe.load import (
    Setting,
    all_settings,
    first_fault,
    json_schema,
    load_recipe,
    save_recipe,
    stored_recipe,
    within_context,
)
from nybble.recipe.plan import (
    Change,
    PhasePlan,
    Plan,
    RungPlan,
    StepMemory,
    in_micro_batches,
    refusal,
    shared_among,
    step_rows,
)
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
    "RungPlan",
    "Setting",
    "StepMemory",
    "TrainingSection",
    "all_settings",
    "first_fault",
    "in_micro_batches",
    "json_schema",
    "load_recipe",
    "refusal",
    "save_recipe",
    "shared_among",
    "step_rows",
    "stored_recipe",
    "within_context",
]
