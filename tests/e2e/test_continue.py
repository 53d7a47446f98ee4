"""Training that goes on from a finished adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nybble.errors import ModelError, RecipeError
from nybble.models import NewTokens, attach, save_adapter
from nybble.models.continued import start_from, take_over_adapter
from nybble.recipe import load_recipe

SHAPE = ("--r", 4, "--lora_alpha", 6, "--target_modules", "q_proj,v_proj", "--lora_dropout", 0.1)


@pytest.fixture
def words(rows_file: Path) -> list[object]:
    settings = {"dataset_name": rows_file, "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "n_samples": 1}
    settings |= {"eval_fraction": 0.2, "max_new_tokens": 4, "device": "cpu", "report_to": "none"}
    return ["train", *(word for name, value in settings.items() for word in (f"--{name}", value))]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_second_training_starts_where_the_first_one_ended(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], words: list[object], tmp_path: Path
) -> None:
    first, still, second = tmp_path / "first", tmp_path / "still", tmp_path / "second"
    begun = nybble(*words, "--model", tiny_llama(), *SHAPE, "--output_dir", first, "--json")
    assert begun.code == 0, begun.err
    # From the run or from the adapter; the base is the one that the adapter names.
    done = nybble(*words, "--adapter_name_or_path", first, "--output_dir", still, "--learning_rate", 1e-30, "--json")
    assert done.code == 0, done.err
    assert done.json["evaluation_base"]["loss"] == begun.json["evaluation_tuned"]["loss"]
    assert all(torch.equal(adapter_of(still)[name], tensor) for name, tensor in adapter_of(first).items())
    taken = load_recipe(still / "recipe.yaml").lora
    assert (taken.r, taken.lora_alpha, taken.target_modules, taken.lora_dropout) == (4, 6, ("q_proj", "v_proj"), 0.1)
    further = ("--adapter_name_or_path", first / "adapter", "--model", tiny_llama())
    done = nybble("train", first / "recipe.yaml", *further, "--output_dir", second, "--json")
    assert done.code == 0, done.err
    assert done.json["evaluation_tuned"]["loss"] < begun.json["evaluation_tuned"]["loss"]
    assert nybble("ask", second, "What is two?").code == 0


def test_it_resumes_bit_by_bit_and_only_from_the_same_adapter(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], words: list[object], tmp_path: Path
) -> None:
    first, straight, out = tmp_path / "first", tmp_path / "straight", tmp_path / "run"
    words = [*words, "--model", tiny_llama()]
    assert nybble(*words, *SHAPE, "--output_dir", first).code == 0
    words += ["--adapter_name_or_path", first / "adapter"]
    assert nybble(*words, "--output_dir", straight).code == 0
    assert nybble(*words, "--output_dir", out, "--max_seconds", 0.001).code == 4
    moved = tmp_path / "moved"
    shutil.move(first / "adapter", moved)
    words[-1] = moved
    assert nybble(*words, "--output_dir", out, "--resume").code == 0
    assert all(torch.equal(adapter_of(out)[name], tensor) for name, tensor in adapter_of(straight).items())
    shutil.copyfile(out / "adapter" / "adapter_model.safetensors", moved / "adapter_model.safetensors")
    refused = nybble(*words, "--output_dir", out, "--resume")
    assert refused.code == 2
    assert "which differs in the adapter (was" in refused.err


def test_another_base_or_another_shape_is_refused(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], words: list[object], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    assert nybble(*words, "--model", tiny_llama(), *SHAPE, "--output_dir", first, "--max_steps", 1).code == 0
    words += ["--adapter_name_or_path", first, "--output_dir", tmp_path / "second"]
    other = nybble(*words, "--model", tiny_llama(tied=True))
    assert other.code == 2
    assert "it is another model; set --model_name_or_path to the right one" in other.err
    for flags, named in {
        ("--lora_alpha", 5): "has lora_alpha 6.0, and the recipe says 5.0;",
        ("--use_dora", "true", "--r", 5): "has r 4, and the recipe says 5; use_dora False, and the recipe says True;",
        ("--target_modules", "q_proj,o_proj"): "has target_modules q_proj, v_proj, and the recipe says q_proj, o_proj;",
        ("--rank_pattern", "{v_proj: 2}"): "and the recipe says {'v_proj': 2};",
        ("--init", "pissa"): "has weights already, and the recipe says init_lora_weights pissa;",
    }.items():
        refused = nybble(*words, *flags)
        assert refused.code == 2
        assert named in refused.err.splitlines()[-1]
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"r": 3, "target_modules": ["q_proj", "down_proj"]},
        {"r": 3, "target_modules": r".*layers\.1\..*proj", "use_rslora": True},
        {"r": 3, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "use_dora": True},
        {"r": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {".*o_proj": 7}},
        {"r": 3, "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["model.layers.0.self_attn.k_proj"]},
    ],
)
def test_an_adapter_of_peft_is_taken_over(
    tiny_llama: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama()), LoraConfig(task_type="CAUSAL_LM", lora_alpha=4, **config)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    recipe = take_over_adapter(
        load_recipe(None, {"adapter_name_or_path": str(tmp_path / "theirs"), "model": str(tiny_llama())})
    )
    ours = attach(AutoModelForCausalLM.from_pretrained(tiny_llama()), recipe.lora, "base")
    start_from(ours, str(tmp_path / "theirs"))
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, atol=1e-4)
    save_adapter(ours, tmp_path / "ours")
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    assert take_over_adapter(recipe) == recipe  # what a run keeps as its recipe agrees with the adapter


@pytest.mark.parametrize("spoilt", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}])
def test_an_adapter_that_holds_what_is_not_learned_is_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path, spoilt: dict[str, Any]
) -> None:
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_llama()), load_recipe().lora, "base")
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **spoilt}))
    with pytest.raises(ModelError, match=r"does not continue from an adapter with .*; merge it first"):
        take_over_adapter(load_recipe(None, {"adapter_name_or_path": str(tmp_path)}))


@pytest.mark.parametrize(
    ("tied", "more"),
    [
        (False, ("--modules_to_save", "lm_head,model.norm")),
        (False, ("--new_tokens", "<call>,two")),
        (True, ("--new_tokens", "<call>,two")),
    ],
)
def test_whole_modules_and_rows_of_tokens_are_learned_on(
    nybble: Callable[..., Any],
    tiny_llama: Callable[..., Path],
    words: list[object],
    tmp_path: Path,
    tied: bool,
    more: tuple[str, ...],
) -> None:
    first, still = tmp_path / "first", tmp_path / "still"
    begun = nybble(*words, "--model", tiny_llama(tied=tied), *SHAPE, *more, "--output_dir", first, "--json")
    assert begun.code == 0, begun.err
    words += ["--adapter_name_or_path", first, "--output_dir", still]
    done = nybble(*words, "--learning_rate", 1e-30, "--json")
    assert done.code == 0, done.err
    assert done.json["evaluation_base"]["loss"] == begun.json["evaluation_tuned"]["loss"]
    assert all(torch.equal(adapter_of(still)[name], tensor) for name, tensor in adapter_of(first).items())
    assert len(adapter_of(first)) == len(adapter_of(still)) > 8  # with more than the factors of two layers
    assert nybble(*words, "--overwrite").code == 0
    assert not all(torch.equal(adapter_of(still)[name], tensor) for name, tensor in adapter_of(first).items())
    assert nybble("ask", still, "What is two?").code == 0
    refused = nybble(*words, "--overwrite", more[0], "norm" if "norm" in more[1] else "<other>")
    assert refused.code == 2
    assert f"has {more[0].removeprefix('--')} " in refused.err
    assert "remove that from the recipe" in refused.err


def test_new_tokens_with_other_numbers_are_refused(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    lora = load_recipe(None, {"new_tokens": ["<call>"]}).lora
    base = AutoModelForCausalLM.from_pretrained(tiny_llama())
    size = len(base.get_input_embeddings().weight)
    save_adapter(attach(base, lora, "base", tokens=NewTokens((size,), size)), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    model = attach(model, lora, "base", tokens=NewTokens((size - 1,), size))
    with pytest.raises(ModelError, match="its new tokens have other numbers with the tokenizer of this base"):
        start_from(model, str(tmp_path))


def test_weights_of_another_shape_are_refused(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama(hidden_size=32))
    save_adapter(attach(base, load_recipe().lora, "base"), tmp_path)
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_llama()), load_recipe().lora, "base")
    with pytest.raises(ModelError, match="adapter does not fit this base: it has other layers or sizes"):
        start_from(model, str(tmp_path))
    with pytest.raises(RecipeError, match="has r 16, and the recipe says 2; remove that from the recipe"):
        take_over_adapter(load_recipe(None, {"adapter_name_or_path": str(tmp_path), "r": 2}))
