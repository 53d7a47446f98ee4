"""One definition of a model's parts, on which loading, planning and training agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.hardware import Device
from nybble.models import (
    attach,
    compute_dtype,
    decoder_layers,
    meta_model,
    recomputable_layers,
    recompute_by,
    set_recomputed,
)
from nybble.models.skeleton import linears_to_pack, model_without_weights
from nybble.nn import Linear4bit
from nybble.nn.lora_projection import projection_of
from nybble.planning import make_plan, named_profile
from nybble.recipe import load_recipe

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


def config_of(kind: str = "llama", **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **{**SIZES, "vocab_size": 128, **changes})


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "opt", "mixtral", "qwen3_moe", "gemma3_text"])
def test_decoder_layers_are_those_that_transformers_can_recompute(kind: str) -> None:
    names = {"n_embd": 64, "n_layer": 3, "n_head": 4} if kind == "gpt2" else {}
    model = model_without_weights(config_of(kind, **names))
    layers = decoder_layers(model)
    assert len(layers) == 3
    assert recomputable_layers(model) == layers
    set_recomputed(layers, 2)
    assert [bool(layer.gradient_checkpointing) for layer in layers] == [True, True, False]


def test_transformers_runs_a_recomputed_layer_by_our_function() -> None:
    model = AutoModelForCausalLM.from_config(config_of()).train()
    layers = recomputable_layers(model)
    ran = []

    def counted(forward: Any, *arguments: Any) -> Any:
        ran.append(forward)
        return forward(*arguments)

    set_recomputed(layers, 2)
    recompute_by(layers, counted)
    model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    assert len(ran) == 2


def test_adapters_leave_the_decoder_layers_as_they_are() -> None:
    recipe = load_recipe(None, {"method": "lora", "r": 4})
    bare = AutoModelForCausalLM.from_config(config_of())
    assert decoder_layers(attach(bare, recipe.lora, "base")) == decoder_layers(bare)


def test_a_model_without_a_list_of_layers_has_none() -> None:
    assert decoder_layers(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_and_what_is_skipped_are_not_packed(tied: bool) -> None:
    model = model_without_weights(config_of(tie_word_embeddings=tied))
    packed, left = linears_to_pack(model, ["up_proj"])
    assert "lm_head" in left
    assert {name for name in left if name.endswith("up_proj")} == {f"model.layers.{n}.mlp.up_proj" for n in range(3)}
    assert len(packed) == 3 * 6
    recipe = load_recipe(None, {"method": "qlora", "skip_modules": "up_proj"})
    planned = meta_model(config_of(tie_word_embeddings=tied), recipe, torch.bfloat16).get_base_model()
    names = [name for name, module in planned.named_modules() if isinstance(module, Linear4bit)]
    assert [name.removesuffix(".base_layer") for name in names] == packed


def test_what_transformers_keeps_in_float32_is_not_packed() -> None:
    model = model_without_weights(config_of())
    model._keep_in_fp32_modules = ["down_proj"]
    packed, left = linears_to_pack(model, [])
    assert {name.rpartition(".")[2] for name in left} == {"down_proj", "lm_head"}
    assert len(packed) == 3 * 6


@pytest.mark.parametrize(
    ("wanted", "backend", "has_bfloat16", "dtype"),
    [
        ("bfloat16", "hip", False, torch.float16),
        ("bfloat16", "cuda", True, torch.bfloat16),
        ("float16", "cpu", True, torch.bfloat16),
    ],
)
def test_a_plan_computes_in_the_type_that_the_run_computes_in(
    wanted: str, backend: str, has_bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old GPU has no bfloat16: loading computes in float16 there, and so must the plan."""
    kind = "cpu" if backend == "cpu" else "cuda"
    device = Device(kind, backend, "old card", 1 << 40, 1, has_bfloat16)
    profile = replace(named_profile("rtx4090"), backend=backend, has_bfloat16=has_bfloat16, memory_bytes=1 << 40)
    recipe = load_recipe(None, {"compute_dtype": wanted, "method": "lora", "r": 4, "max_length": 32})
    seen = []

    def recorded(config: Any, recipe: Any, dtype: torch.dtype, *bare: Any) -> Any:
        seen.append(dtype)
        return meta_model(config, recipe, dtype, *bare)

    monkeypatch.setattr("nybble.planning.extrapolate.meta_model", recorded)
    make_plan(recipe, config_of(), profile)
    assert set(seen) == {compute_dtype(wanted, device)[0]} == {dtype}


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_linear_with_a_hook_is_not_fused(kind: str) -> None:
    linear = torch.nn.Linear(4, 4).requires_grad_(False)
    assert projection_of(linear) is not None
    getattr(linear, f"register_{kind}_hook")(lambda *_: None)
    assert projection_of(linear) is None
