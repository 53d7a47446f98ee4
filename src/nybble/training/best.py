"""The best evaluation of a training: which step it was, and whether a better one can still be waited for.

As transformers' EarlyStoppingCallback does it, any better figure is the new best, and only one that is better by more
than the threshold starts the waiting anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nybble.data import Prepared
from nybble.errors import RecipeError
from nybble.recipe import EvaluationSection, TrainingSection, evaluation_pace
from nybble.run.record import Evaluation


class BestStep:
    """Follows the evaluations of one training; `state_dict` is what a resumed one continues from."""

    def __init__(self, section: EvaluationSection | None = None) -> None:
        """Without a section, evaluations decide nothing."""
        section = section or EvaluationSection()
        self.metric = section.metric_for_best_model
        greater = section.greater_is_better
        self._sign = 1.0 if (self.metric == "eval_exact_match" if greater is None else greater) else -1.0
        self._patience = section.early_stopping_patience
        self._threshold = section.early_stopping_threshold
        self.is_loaded_at_end = section.load_best_model_at_end
        self.step: int | None = None  # the step with the best figure
        self.value: float | None = None
        self.n_waited = 0  # evaluations since the last one that was better by more than the threshold

    @property
    def counts(self) -> bool:
        """Whether the evaluations decide what the training gives."""
        return self.is_loaded_at_end or self._patience is not None

    @property
    def is_over(self) -> bool:
        """Whether the training stops, because nothing better has come for too long."""
        return self._patience is not None and self.n_waited >= self._patience

    def judge(self, step: int, measured: Evaluation) -> bool:
        """Take an evaluation in; whether it is the best so far. A figure that is not a number never is."""
        value = measured.loss if self.metric == "eval_loss" else measured.exact_match
        gain = -math.inf if value is None or math.isnan(value) else math.inf
        if value is not None and self.value is not None and gain > 0:
            gain = self._sign * (value - self.value)
        self.n_waited = 0 if gain > self._threshold else self.n_waited + 1
        if gain > 0:
            self.step, self.value = step, value
        return gain > 0

    @property
    def in_words(self) -> str:
        """The best figure, for people."""
        if self.value is None:
            return f"{self.metric} was never a number"
        return f"best {self.metric} {self.value:.4f} at step {self.step}"

    def to_json(self) -> dict[str, Any] | None:
        """The best figure for run.json."""
        return None if self.step is None else {"step": self.step, "metric": self.metric, "value": self.value}

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"step": self.step, "value": self.value, "n_waited": self.n_waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.step, self.value, self.n_waited = state["step"], state["value"], state["n_waited"]


def check_best_step(evaluation: EvaluationSection, training: TrainingSection, prepared: Prepared | None = None) -> None:
    """Refuse settings that follow evaluations which never happen, or a figure that the rows do not allow.

    Args:
        evaluation: the recipe's.
        training: the recipe's.
        prepared: the rows; None where they are not known yet.

    Raises:
        RecipeError: as said.
    """
    names = {
        "load_best_model_at_end": evaluation.load_best_model_at_end,
        "early_stopping_patience": evaluation.early_stopping_patience is not None,
        "save_strategy: best": training.save_strategy == "best",
    }
    name = next((name for name, is_given in names.items() if is_given), None)
    if name is None:
        return
    if evaluation_pace(evaluation).strategy == "no":
        raise RecipeError(f"{name} follows evaluations and there are none; set --eval_steps or --eval_strategy epoch")
    if prepared is not None and not prepared.held_out:
        raise RecipeError(
            f"{name} follows evaluations and no row is held out; raise --eval_fraction, or give --eval_dataset_name"
        )
    if (
        prepared is not None
        and evaluation.metric_for_best_model == "eval_exact_match"
        and not any(example.answer is not None and example.prompt_ids for example in prepared.held_out)
    ):
        raise RecipeError(
            f"metric_for_best_model: eval_exact_match needs held-out rows with a column {evaluation.answer_field!r} "
            "that holds the exact answer; add it, or take eval_loss"
        )
