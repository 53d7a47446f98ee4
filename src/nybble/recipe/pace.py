"""After which optimizer steps a training evaluates and saves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.recipe.schema import EvaluationSection, TrainingSection


@dataclass(frozen=True)
class Pace:
    """How often something happens: every so many steps, at the end of each epoch, or never."""

    strategy: str  # "steps", "epoch", or another, under which no step is due
    n_steps: int = 0  # between two; 0: no step is due
    steps_an_epoch: int = 1

    @property
    def first(self) -> int:
        """The first step at which it happens; 0: it never does."""
        return {"steps": self.n_steps, "epoch": self.steps_an_epoch}.get(self.strategy, 0)

    def is_due(self, step: int) -> bool:
        """Whether it happens after `step` steps."""
        return self.first > 0 and step % self.first == 0


def saving_pace(section: TrainingSection, max_steps: int, steps_an_epoch: int) -> Pace:
    """When checkpoints are written, beside the last one and those of the best evaluations."""
    return Pace(section.save_strategy, _steps(section.save_steps, max_steps), steps_an_epoch)


def saves_by_time(section: TrainingSection) -> bool:
    """Whether a checkpoint is also written when none was for `save_minutes`."""
    return section.save_minutes > 0 and section.save_strategy in ("steps", "epoch")


def saving_in_words(section: TrainingSection) -> str:
    """When checkpoints are written, for people."""
    steps = section.save_steps
    often = {
        "no": "only when the run is stopped",
        "best": "at each best evaluation, and at the end",
        "epoch": "after each epoch, and at the end",
        "steps": f"every {f'{100 * steps:g} % of the' if steps < 1 else f'{steps:,.0f}'} steps, and at the end",
    }[section.save_strategy]
    by_time = f"; also after {section.save_minutes:g} minutes without one" if saves_by_time(section) else ""
    return f"checkpoints {often}{by_time}"


def evaluation_pace(
    section: EvaluationSection, logging_steps: float = 0, max_steps: int = 1, steps_an_epoch: int = 1
) -> Pace:
    """When the held-out rows are evaluated; under `eval_strategy: steps` without eval_steps, whenever steps are logged.

    As in transformers, numbers of steps below 1 are a fraction of all steps.
    """
    strategy = section.eval_strategy or ("steps" if section.eval_steps else "no")
    return Pace(strategy, _steps(section.eval_steps or logging_steps, max_steps), steps_an_epoch)


def _steps(number: float, max_steps: int) -> int:
    return math.ceil(number * max_steps) if number < 1 else int(number)
