"""Recipes: the schema (one definition per setting), reading them, and the plan that is made from one."""

from nybble.recipe.batches import for_one_process, in_micro_batches, rows_per_step, step_in_words
from nybble.recipe.catalogue import SECTIONS, Setting, all_settings, path_of
from nybble.recipe.load import (
    RecipeSource,
    first_fault,
    json_schema,
    load_recipe,
    save_recipe,
    stored_recipe,
    within_context,
)
from nybble.recipe.pace import Pace, evaluation_pace, saves_by_time, saving_in_words, saving_pace
from nybble.recipe.plan import (
    Change,
    LevelPlan,
    PhasePlan,
    Plan,
    StepMemory,
    refusal,
)
from nybble.recipe.preferences import Objective, PreferencesSection
from nybble.recipe.schema import (
    DataSection,
    DataSet,
    EvaluationSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
    Recipe,
    TrainingSection,
)
from nybble.recipe.setting import check_pattern, is_name

__all__ = [
    "SECTIONS",
    "Change",
    "DataSection",
    "DataSet",
    "EvaluationSection",
    "LevelPlan",
    "LoraSection",
    "ModelSection",
    "Objective",
    "Pace",
    "PhasePlan",
    "Plan",
    "PreferencesSection",
    "QuantizationSection",
    "Recipe",
    "RecipeSource",
    "Setting",
    "StepMemory",
    "TrainingSection",
    "all_settings",
    "check_pattern",
    "evaluation_pace",
    "first_fault",
    "for_one_process",
    "in_micro_batches",
    "is_name",
    "json_schema",
    "load_recipe",
    "path_of",
    "refusal",
    "rows_per_step",
    "save_recipe",
    "saves_by_time",
    "saving_in_words",
    "saving_pace",
    "step_in_words",
    "stored_recipe",
    "within_context",
]
