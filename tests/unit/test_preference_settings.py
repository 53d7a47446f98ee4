"""The settings of preference tuning: limits, which objective reads which, and other tools' names."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import nybble
from nybble.errors import RecipeError
from nybble.recipe import load_recipe
from nybble.recipe.importing import import_recipe


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "dpo", "beta": 0}, r"preferences\.beta: got 0; input should be greater than 0"),
        ({"objective": "kto", "beta": -0.1}, r"preferences\.beta: got -0\.1; input should be greater than 0"),
        ({"objective": "dpo", "label_smoothing": 0.5}, r"label_smoothing: got 0\.5; input should be less than 0\.5"),
        ({"objective": "dpo", "ld_alpha": 1.5}, r"ld_alpha: got 1\.5; input should be less than or equal to 1"),
        ({"objective": "ppo"}, r"objective: got 'ppo'; input should be 'sft', 'dpo', 'ipo', 'kto', 'orpo' or 'simpo'"),
        ({"objective": "dpo", "loss_type": "exo_pair"}, r"loss_type: got 'exo_pair'; input should be 'sigmoid', "),
        ({"objective": "dpo", "loss_type": "hinge", "label_smoothing": 0.1}, r"label_smoothing is for loss_type sig"),
        ({"objective": "dpo", "overlong": "split"}, r"overlong: split would part answers that objective dpo compares"),
        ({"objective": "simpo", "loss_on": "all"}, r"objective simpo compares whole answers; use loss_on: answers or"),
        ({"objective": "orpo", "learning_rate": "probe"}, r"learning_rate: probe compares supervised losses; give a"),
        (
            {"objective": "dpo", "method": "full", "precompute_ref_log_probs": False},
            r"objective dpo with method: full needs precompute_ref_log_probs: true",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(settings)
    assert "\n" not in str(caught.value)


def test_settings_of_other_objectives_are_named() -> None:
    assert load_recipe({"beta": 0.2, "simpo_gamma": 1}).preferences.unused == ("beta", "simpo_gamma")
    given = {"beta": 0.2, "ld_alpha": 0.5, "simpo_gamma": 1, "desirable_weight": 2, "label_smoothing": 0.1}
    assert load_recipe({"objective": "dpo", **given}).preferences.unused == ("simpo_gamma", "desirable_weight")
    assert load_recipe({"objective": "kto", **given}).preferences.unused == (
        "label_smoothing", "ld_alpha", "simpo_gamma"
    )  # fmt: skip
    assert load_recipe({"objective": "simpo", **given}).preferences.unused == ("ld_alpha", "desirable_weight")


def test_names_of_other_tools_are_understood() -> None:
    section = load_recipe({"rl": "dpo", "rl_beta": 0.3, "dpo_label_smoothing": 0.1}).preferences
    assert (section.objective, section.beta, section.label_smoothing) == ("dpo", 0.3, 0.1)
    assert section.compares
    assert section.needs_reference
    section = load_recipe({"stage": "dpo", "pref_beta": 0.2, "pref_ftx": 0.5, "loss_type": ["hinge"]}).preferences
    assert (section.beta, section.rpo_alpha, section.loss_type) == (0.2, 0.5, "hinge")
    assert not load_recipe({"objective": "kto"}).preferences.compares
    assert not load_recipe({"objective": "orpo"}).preferences.needs_reference


@pytest.mark.parametrize(
    ("content", "objective"),
    [
        ({"stage": "dpo", "pref_loss": "sigmoid", "pref_beta": 0.2}, "dpo"),
        ({"stage": "dpo", "pref_loss": "orpo"}, "orpo"),
        ({"pref_loss": "simpo", "stage": "dpo"}, "simpo"),
        ({"stage": "kto"}, "kto"),
        ({"base_model": "a", "micro_batch_size": 2, "rl": "ipo", "rl_beta": 0.2}, "ipo"),
    ],
)
def test_recipes_of_other_tools_keep_their_objective(tmp_path: Path, content: dict[str, Any], objective: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "a", **content}))
    imported = import_recipe(file)
    assert imported.recipe.preferences.objective == objective
    assert "pref_beta" not in content or imported.recipe.preferences.beta == content["pref_beta"]
    assert not any("said twice" in remark or "pref" in remark for remark in imported.remarks)


@pytest.mark.parametrize(
    ("content", "settings", "remark"),
    [
        (
            {"beta": 0.05, "loss_type": ["ipo"], "use_peft": True},
            {"objective": "ipo", "beta": 0.05, "learning_rate": 1e-6, "lora_dropout": 0},
            "",
        ),
        ({"loss_type": "hinge", "learning_rate": 1e-5}, {"loss_type": "hinge", "learning_rate": 1e-5}, ""),
        ({"desirable_weight": 1.2, "beta": 0.2}, {"objective": "kto", "desirable_weight": 1.2}, ""),
        ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.6}, {"objective": "simpo", "simpo_gamma": 1.6}, ""),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 1]}, {"objective": "dpo", "rpo_alpha": 2}, ""),
        ({"precompute_ref_log_probs": True}, {"objective": "dpo"}, ""),
        ({"beta": 0.1}, {"objective": "sft"}, "beta (0.1): a recipe of TRL does not name its trainer; set objective"),
        ({"loss_type": "nll"}, {"objective": "sft"}, ""),
        ({"loss_type": "dft"}, {"objective": "sft"}, "loss_type (dft): an objective is one of sft, dpo"),
        ({"loss_type": ["sigmoid", "bco_pair"]}, {"objective": "dpo"}, "loss_type (bco_pair): loss_type is one of sig"),
        ({"loss_type": {"a": 1}, "loss_weights": 3}, {"objective": "sft"}, ""),
        (
            {"use_peft": True, "lora_dropout": 0.1, "loss_type": "sigmoid"},
            {"lora_dropout": 0},
            "lora_dropout (0.1): TRL's disable_dropout turns it off, so it is 0 here",
        ),
        (
            {"use_peft": True, "lora_dropout": 0.1, "loss_type": "ipo", "disable_dropout": False},
            {"lora_dropout": 0.1},
            "",
        ),
        (
            {"base_model": "a", "rl": "orpo", "orpo_alpha": 0.3, "datasets": [{"path": "b", "type": "chatml.argilla"}]},
            {"objective": "orpo", "beta": 0.3, "dataset_name": "b"},
            "",
        ),
        (
            {
                "base_model": "a",
                "rl": "dpo",
                "datasets": [{"path": "b", "field_messages": "talk", "field_chosen": "x", "field_rejected": "y"}],
            },
            {"columns": ("chosen=x", "messages=talk", "rejected=y")},
            "",
        ),
        ({"base_model": "a", "rl": "simpo", "cpo_alpha": 1.0}, {"objective": "simpo"}, "cpo_alpha (1.0): the losses"),
        ({"stage": "kto", "ref_model": "b"}, {"objective": "kto"}, "ref_model (b): the reference is the"),
        ({"stage": "dpo", "pref_loss": "kto_pair"}, {"objective": "dpo"}, "pref_loss (kto_pair): loss_type is one of"),
    ],
)  # fmt: skip
def test_what_recipes_say_of_preferences(
    tmp_path: Path, content: dict[str, Any], settings: dict[str, Any], remark: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "a", **content}))
    imported = import_recipe(file)
    values = {name: value for section in imported.recipe.model_dump().values() if isinstance(section, dict)
              for name, value in section.items()}  # fmt: skip
    assert {name: values[name] for name in settings} == settings
    remarks = [text for text in imported.remarks if not text.startswith("loss:")]
    assert any(text.startswith(remark) for text in remarks) if remark else not remarks


def test_a_stage_that_is_no_objective_is_remarked(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "a", "stage": "ppo"}))
    imported = import_recipe(file)
    assert imported.recipe.preferences.objective == "sft"
    assert any(remark.startswith("stage (ppo): an objective is one of sft, dpo") for remark in imported.remarks)


def test_a_probe_is_for_supervised_losses(tmp_path: Path) -> None:
    settings = {"objective": "dpo", "model": "llama-2-7b", "output_dir": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match=r"a probe compares supervised losses; objective dpo has none"):
        nybble.probe(settings)
