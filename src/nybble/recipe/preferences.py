"""The settings of preference tuning, by TRL's names: what is learned of answers that were compared or rated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from nybble.recipe.setting import Section, setting

Objective = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo"]
# Objective -> the settings of the section that it reads beside beta.
_READ_BY: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("loss_type", "label_smoothing", "rpo_alpha", "ld_alpha", "precompute_ref_log_probs"),
    "ipo": ("rpo_alpha", "ld_alpha", "precompute_ref_log_probs"),
    "kto": ("desirable_weight", "undesirable_weight", "precompute_ref_log_probs"),
    "orpo": (),
    "simpo": ("simpo_gamma", "label_smoothing"),
}


class PreferencesSection(Section):
    """What is learned from the rows: their answers, or which of two answers is preferred."""

    objective: Objective = setting(
        "sft",
        "What is learned: the answers themselves (sft), which of two answers is chosen (dpo, ipo, orpo, simpo), or "
        "whether an answer is good (kto). dpo, ipo and kto compare with a reference, the model as training started; "
        "orpo and simpo need none.",
        aliases=("rl", "stage"),
    )
    beta: float = setting(
        0.1,
        "How strongly a preference objective holds on to the reference (dpo, ipo, kto), or its weight (orpo) or scale "
        "(simpo, for which 2 is usual).",
        aliases=("pref_beta", "rl_beta"),
        gt=0,
        le=1e6,
    )
    loss_type: Literal["sigmoid", "hinge", "robust"] = setting(
        "sigmoid",
        "Form of the dpo loss: sigmoid as in the paper, hinge (SLiC), or robust, which allows for a share of wrong "
        "labels (label_smoothing).",
        aliases=("pref_loss",),
    )
    label_smoothing: float = setting(
        0.0,
        "Share of the pairs whose answers are taken to be in the wrong order, for dpo (sigmoid, robust) and simpo.",
        aliases=("dpo_label_smoothing",),
        ge=0,
        lt=0.5,
    )
    rpo_alpha: float = setting(
        0.0,
        "Weight of the supervised loss of the chosen answer that is added under dpo and ipo (RPO); 0: none.",
        aliases=("pref_ftx", "dpo_ftx"),
        ge=0,
        le=1e6,
    )
    ld_alpha: float | None = setting(
        None,
        "Under dpo and ipo, weight of the tokens of an answer beyond the length of the shorter one (LD-DPO).",
        unset="1, as all other tokens",
        ge=0,
        le=1,
    )
    simpo_gamma: float = setting(
        0.5,
        "Under simpo, the margin that the chosen answer's score must be ahead by.",
        aliases=("cpo_simpo_gamma",),
        ge=0,
        le=1e6,
    )
    desirable_weight: float = setting(
        1.0,
        "Under kto, weight of the good answers.",
        aliases=("kto_desirable_weight", "kto_chosen_weight"),
        ge=0,
        le=1e6,
    )
    undesirable_weight: float = setting(
        1.0,
        "Under kto, weight of the bad answers.",
        aliases=("kto_undesirable_weight", "kto_rejected_weight"),
        ge=0,
        le=1e6,
    )
    precompute_ref_log_probs: bool = setting(
        True,
        "Compute the reference's log-probabilities once, before the training, and keep them in the run; otherwise they "
        "are computed in every step.",
    )

    @field_validator("loss_type", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value  # as TRL writes it

    @property
    def compares(self) -> bool:
        """Whether rows hold two answers, of which one is preferred."""
        return self.objective in ("dpo", "ipo", "orpo", "simpo")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model as it was when training started."""
        return self.objective in ("dpo", "ipo", "kto")

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings of this section that were set and that the objective does not read."""
        read = ("objective", *(("beta",) if self.objective != "sft" else ()), *_READ_BY[self.objective])
        fields = type(self).model_fields
        return tuple(name for name in fields if name not in read and getattr(self, name) != fields[name].default)

    @model_validator(mode="after")
    def _consistent(self) -> PreferencesSection:
        if self.label_smoothing and self.loss_type == "hinge":
            raise ValueError("label_smoothing is for loss_type sigmoid or robust; choose one of them, or remove it")
        return self
