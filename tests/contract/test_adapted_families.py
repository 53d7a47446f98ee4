"""What is packed and adapted in families that differ from Llama, and what stock PEFT and transformers make of it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from nybble.errors import ModelError, RecipeError
from nybble.exporting.arithmetic import AdapterDelta, write_merged
from nybble.models import (
    BaseWeights,
    ModelSource,
    adapted_linears,
    attach,
    load_adapter,
    model_without_weights,
    read_config,
    save_adapter,
)
from nybble.models.skeleton import linears, linears_to_pack, routers
from nybble.nn import Linear4bit
from nybble.recipe import LoraSection
from tools.families import tiny_config

ALL = LoraSection(r=4, lora_alpha=8, target_modules="all-linear")
# Families whose layers with experts also have linears that PEFT takes for experts, and one without any.
EXPERTS = ("deepseek_v3", "qwen2_moe", "qwen3_next", "mixtral", "hunyuan_v1_moe")
# Families whose checkpoints have other names than the model, or several names for one weight.
RENAMED = ("gpt2", "falcon", "axk2", "hy_v3", "laguna", "lfm3")


@cache
def whole(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, 128)).float().eval()


def skeleton(family: str) -> Any:
    return model_without_weights(tiny_config(family, 128))


def with_effect(adapted: Any) -> Any:
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return adapted.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 15)[None]
    return model(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2_moe", {"shared_expert_gate"}),
        ("hunyuan_v1_moe", {"wg"}),
        ("afmoe", {"gate"}),
        ("jetmoe", {"layer"}),
        ("longcat_flash", {"classifier"}),
        ("mamba", set()),
        ("llama", set()),
    ],
)
def test_linears_that_choose_experts_are_neither_packed_nor_adapted(family: str, expected: set[str]) -> None:
    model = skeleton(family)
    found = routers(model)
    assert {name.rpartition(".")[2] for name in found} == expected
    assert not found & {*linears_to_pack(model, ())[0]}
    assert not found & {*adapted_linears(model, ALL)}


def test_a_linear_that_chooses_experts_is_adapted_where_it_is_named() -> None:
    adapted = adapted_linears(skeleton("afmoe"), ALL.model_copy(update={"target_modules": "router.gate"}))
    assert adapted
    assert all(name.endswith("router.gate") for name in adapted)


@pytest.mark.parametrize("family", ["phimoe", "llama4_text"])
def test_a_router_that_is_a_linear_with_several_results_is_no_linear(family: str) -> None:
    model = skeleton(family)
    odd = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "Router" in type(m).__name__}
    assert odd
    assert not odd & {*linears(model)}


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_linears_of_older_families_are_packed(family: str) -> None:
    model = skeleton(family)
    packed, left = linears_to_pack(model, ())
    assert left == ["lm_head"]
    assert {type(model.get_submodule(name)).__name__ for name in packed} <= {"Conv1D", "FalconLinear"}
    assert len(packed) == 8


@pytest.mark.parametrize("family", ["mamba", "nemotron_h"])
def test_what_peft_refuses_is_left_out_and_refused_by_name(family: str) -> None:
    model = skeleton(family)
    ends = {name.rpartition(".")[2] for name in adapted_linears(model, ALL)}
    assert "in_proj" in ends
    assert "out_proj" not in ends
    with pytest.raises(RecipeError, match=r"out_proj cannot have an adapter.*leave it out"):
        adapted_linears(model, ALL.model_copy(update={"target_modules": ("in_proj", "out_proj")}))


@pytest.mark.parametrize("family", [*EXPERTS, *RENAMED])
def test_an_adapter_on_all_linears_is_the_same_in_stock_peft_and_merged(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    whole(family).save_pretrained(base)
    adapted = with_effect(attach(copy.deepcopy(whole(family)), ALL, str(base)))
    before, wanted = logits(whole(family)), logits(adapted)
    assert (before - wanted).abs().max() > 1e-3
    save_adapter(adapted, tmp_path / "adapter")
    names = set(adapted_linears(whole(family), ALL))
    # transformers renames laguna's `shared_expert` to `shared_experts`, and stock PEFT does it again to what it saved.
    for reader in (PeftModel.from_pretrained, load_adapter)[family == "laguna" :]:
        loaded = reader(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
        assert sum("lora_A" in name for name, _ in loaded.named_parameters()) >= len(names)
        torch.testing.assert_close(logits(loaded), wanted, atol=1e-5, rtol=1e-4)
    merged = tmp_path / "merged"
    merged.mkdir()
    source = ModelSource(str(base), base, read_config(base, False), None)
    with BaseWeights(source) as weights, AdapterDelta(tmp_path / "adapter") as delta:
        write_merged(weights, delta, merged, torch.float32)
    source.config.save_pretrained(merged)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), wanted, atol=1e-5, rtol=1e-4)


def test_packed_weights_of_gpt2_are_its_own_turned(tmp_path: Path) -> None:
    from nybble.models import NybbleConfig, register

    register()
    whole("gpt2").save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=NybbleConfig(bnb_4bit_compute_dtype="float32")
    ).eval()
    twin = copy.deepcopy(whole("gpt2"))
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            linear = twin.get_submodule(name)
            assert isinstance(linear, Conv1D)
            linear.weight = nn.Parameter(module.dequantize(torch.float32).t())
    torch.testing.assert_close(logits(packed), logits(twin), atol=1e-5, rtol=1e-4)
    assert torch.nn.functional.cosine_similarity(logits(packed), logits(whole("gpt2")), dim=-1).min() > 0.95


def test_adapters_of_layers_that_share_a_weight_are_not_merged(tmp_path: Path) -> None:
    base = tmp_path / "base"
    whole("zamba2").save_pretrained(base)
    save_adapter(attach(copy.deepcopy(whole("zamba2")), ALL, str(base)), tmp_path / "adapter")
    source = ModelSource(str(base), base, read_config(base, False), None)
    refused = pytest.raises(ModelError, match=r"are one weight in .* use the adapter on its base")
    with BaseWeights(source) as weights, AdapterDelta(tmp_path / "adapter") as delta, refused:
        write_merged(weights, delta, tmp_path, torch.float32)
