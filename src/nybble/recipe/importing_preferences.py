"""What a recipe of TRL, Axolotl or LLaMA-Factory says of preferences, as our settings.

Axolotl (`rl`) and LLaMA-Factory (`stage`, `pref_loss`) name the objective. A recipe of TRL does not, because each of
its trainers has a script of its own; there it follows from the settings that only one of the trainers has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from nybble.guard import clipped
from nybble.recipe.preferences import Objective

_OBJECTIVES = get_args(Objective)
_ALLOWED = f"an objective is one of {', '.join(_OBJECTIVES)} here"
_LOSSES = ("sigmoid", "hinge", "robust")  # of dpo
# What only one of TRL's trainers has, where its loss does not say it.
_OF_TRL = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "simpo": ("simpo_gamma",),
    "dpo": ("precompute_ref_log_probs", "label_smoothing", "ld_alpha", "rpo_alpha", "f_divergence_type"),
}  # fmt: skip
_RATE_OF_TRL = 1e-6  # of its preference trainers


@dataclass
class SaidOfPreferences:
    """What is ours of it, by path, with a remark for what means something else here."""

    settings: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)  # settings of the other recipe that are dealt with

    @property
    def objective(self) -> str:
        """The objective, if the recipe says one."""
        return str(self.settings.get("preferences.objective", "sft"))

    def _remark(self, name: str, value: Any, text: str) -> None:
        self.remarks.append(f"{name} ({clipped(' '.join(str(value).split()))}): {text}")


def preferences_of(tool: str, content: Mapping[str, Any]) -> SaidOfPreferences:
    """The preference settings of a recipe of `tool`: "trl", "axolotl" or "llama_factory"."""
    said = SaidOfPreferences()
    if tool == "trl":
        _of_trl(said, content)
    else:
        _of_others(said, content, "rl" if tool == "axolotl" else "stage")
    if "orpo_alpha" in content:
        said.names.add("orpo_alpha")
        if said.objective == "orpo":
            said.settings["preferences.beta"] = content["orpo_alpha"]
    if said.objective != "sft" and content.get("cpo_alpha") in (0, 0.0):
        said.names.add("cpo_alpha")
    return said


def _of_others(said: SaidOfPreferences, content: Mapping[str, Any], name: str) -> None:
    objective, loss = content.get(name), content.get("pref_loss")
    if objective is None or (name == "stage" and objective == "pt"):
        return
    said.names |= {name, "pref_loss"} & content.keys()
    if objective not in _OBJECTIVES:
        said._remark(name, objective, _ALLOWED)
    elif objective == "dpo" and loss in _OBJECTIVES:
        said.settings["preferences.objective"] = loss
    else:
        said.settings["preferences.objective"] = objective
        if objective == "dpo" and loss is not None:
            _loss(said, "pref_loss", loss)


def _of_trl(said: SaidOfPreferences, content: Mapping[str, Any]) -> None:
    loss_type = content.get("loss_type", [])
    losses = [loss for loss in (loss_type if isinstance(loss_type, list) else [loss_type]) if isinstance(loss, str)]
    named = next((loss for loss in losses if loss in _OBJECTIVES and loss != "sft"), None)
    own = (objective for objective, names in _OF_TRL.items() if content.keys() & set(names))
    objective = named or ("dpo" if set(losses) & {*_LOSSES} else None) or next(own, None)
    said.names |= {"loss_type", "loss_weights", "disable_dropout"} & content.keys()
    if objective is None:
        if losses and losses != ["nll"]:
            said._remark("loss_type", content["loss_type"], _ALLOWED)
        if "beta" in content:
            said._remark(
                "beta", content["beta"], "a recipe of TRL does not name its trainer; set objective: dpo, kto or orpo"
            )
        return
    said.settings["preferences.objective"] = objective
    for loss in losses:
        if loss not in _OBJECTIVES:
            _loss(said, "loss_type", loss)
    if "sft" in losses and len(losses) == 2:
        said.settings["preferences.rpo_alpha"] = _weight_of_sft(content.get("loss_weights"), losses.index("sft"))
    if "learning_rate" not in content:
        said.settings["training.learning_rate"] = _RATE_OF_TRL
    if content.get("disable_dropout") is not False:
        if content.get("lora_dropout"):
            said._remark("lora_dropout", content["lora_dropout"], "TRL's disable_dropout turns it off, so it is 0 here")
            said.names.add("lora_dropout")
        said.settings["lora.lora_dropout"] = 0.0


def _weight_of_sft(weights: Any, place: int) -> float:
    """The weight of the supervised loss beside that of the other loss, which is 1 here."""
    if not (isinstance(weights, list) and len(weights) == 2 and all(isinstance(w, int | float) for w in weights)):
        return 1.0
    return float(weights[place] / weights[1 - place]) if weights[1 - place] else 1.0


def _loss(said: SaidOfPreferences, name: str, loss: Any) -> None:
    if loss in _LOSSES:
        said.settings["preferences.loss_type"] = loss
    else:
        said._remark(name, loss, f"loss_type is one of {', '.join(_LOSSES)} here, and {_ALLOWED}")
