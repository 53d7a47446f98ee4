"""The settings that choose adapters, against PEFT: the same layers, ranks, scales, losses and gradients."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.data import FlatBatch, PadBatch
from nybble.errors import ModelError, RecipeError
from nybble.exporting.arithmetic import AdapterDelta
from nybble.models import (
    adapted_linears,
    attach,
    load_adapter,
    read_adapter,
    same_in_every_layer,
    save_adapter,
    swap_blocks,
)
from nybble.nn import Linear4bit
from nybble.planning import make_plan, named_profile
from nybble.recipe import LoraSection, load_recipe

N_LAYERS = 6
# Settings as a recipe has them; PEFT gets the same words.
CASES: dict[str, dict[str, Any]] = {
    "ranks by name": {"rank_pattern": {"down_proj": 2, "q_proj": 6}},
    "ranks and alphas by pattern": {
        "rank_pattern": {r".*layers\.[0-2]\..*q_proj": 8, "q_proj": 3},
        "alpha_pattern": {r"layers\.5\.mlp\.\w+": 1.5, "v_proj": 3},
    },
    "rank-stabilized": {"rank_pattern": {"up_proj": 9}, "alpha_pattern": {"up_proj": 2}, "use_rslora": True},
    "a regular expression": {"target_modules": r".*layers\.(1|3)\.self_attn\.[qv]_proj"},
    "excluded by name": {"exclude_modules": ("k_proj", "layers.2.mlp.gate_proj")},
    "excluded by pattern": {"exclude_modules": r".*layers\.[0-3]\.mlp.*"},
    "some layers": {"target_modules": ("gate_proj", "q_proj"), "layers_to_transform": (1, 4)},
    "layers of a list": {"target_modules": ("q_proj",), "layers_to_transform": (5,), "layers_pattern": ("layers",)},
}


def config() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model("llama", **sizes, vocab_size=320, num_hidden_layers=N_LAYERS)


def bare() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(), attn_implementation="sdpa")


def with_effect(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def ours(base: Any, **lora: Any) -> Any:
    twin = copy.deepcopy(base)
    assert swap_blocks(twin).flattened
    return with_effect(attach(twin, LoraSection(r=4, lora_alpha=8, **lora), "a/base"))


def theirs(base: Any, **lora: Any) -> Any:
    words = {name: list(value) if isinstance(value, tuple) else value for name, value in lora.items()}
    settings = {"target_modules": "all-linear", **words}
    return with_effect(
        get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    )


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(1, 300, (length,), generator=generator).tolist() for length in (19, 30, 7)]
    return [{"input_ids": one, "labels": [t if n % 3 else -100 for n, t in enumerate(one)]} for one in ids]


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    n = int((batch["labels"][:, 1:] != -100).sum())
    loss = model(**batch, num_items_in_batch=n).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES)
def test_layers_ranks_losses_and_gradients_are_those_of_peft(lora: dict[str, Any]) -> None:
    base, padded = bare(), [[row] for row in rows()]
    expected_loss, expected = gradients(theirs(base, **lora), PadBatch(0)(padded))
    loss, found = gradients(ours(base, **lora), FlatBatch()(padded))
    assert {name: grad.shape for name, grad in found.items()} == {name: grad.shape for name, grad in expected.items()}
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES)
def test_saved_adapters_load_in_stock_peft_and_here_and_merge_as_peft_merges(
    lora: dict[str, Any], tmp_path: Path
) -> None:
    base = bare()
    ids = torch.arange(4, 36).view(2, 16)
    tuned = ours(base, **lora).eval()
    expected = tuned(ids).logits.detach()
    save_adapter(tuned, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-4, atol=1e-4)
    here = load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(here(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged = stock.merge_and_unload()
    with AdapterDelta(tmp_path) as delta:
        names = delta.modules()
        assert names == sorted(adapted_linears(base, LoraSection(r=4, lora_alpha=8, **lora)))
        for name in names:
            own = delta.apply(name, base.get_submodule(name).weight.detach())
            torch.testing.assert_close(own, merged.get_submodule(name).weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES)
def test_the_plan_counts_the_adapters_of_every_layer(lora: dict[str, Any]) -> None:
    recipe = load_recipe(None, {"r": 4, "lora_alpha": 8, "max_length": 32, **lora})
    plan = make_plan(recipe, config(), named_profile("rtx4090"))
    assert plan.trainable_parameters == sum(p.numel() for p in ours(bare(), **lora).parameters() if p.requires_grad)


def test_layers_that_differ_are_traced_with_the_largest_adapters() -> None:
    lora = LoraSection(
        r=4, rank_pattern={r".*\.2\..*q_proj": 9}, exclude_modules=r".*\.[0-4]\.mlp.*", target_modules=".*proj"
    )
    alike, is_alike = same_in_every_layer(bare(), lora)
    assert not is_alike
    sizes = adapted_linears(bare(), alike)
    assert len(sizes) == 7 * N_LAYERS
    assert {size.r for name, size in sizes.items() if name.endswith("q_proj")} == {9}
    assert same_in_every_layer(bare(), LoraSection(rank_pattern={"q_proj": 9}))[1]


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank_pattern": {"q_prj": 3}}, "rank_pattern: 'q_prj' matches none of the adapted layers, such as model.lay"),
        ({"target_modules": ("v_proj",), "alpha_pattern": {"q_proj": 3}}, "alpha_pattern: 'q_proj' matches none"),
        ({"target_modules": "q_proj|v_proj"}, "'q_proj|v_proj' matches no linear layer, such as model.layers.0.self_a"),
        ({"exclude_modules": ("head",)}, "exclude_modules: 'head' matches no linear layer; this model has down_proj"),
        ({"layers_to_transform": (1, 6)}, "layers_to_transform: got 6; allowed: 0 to 5, the decoder layers of this"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "together leave no linear layer"),
        ({"layers_to_transform": (0,), "layers_pattern": ("h",)}, "together leave no linear layer"),
    ],
)
def test_what_matches_nothing_is_refused_when_the_run_is_planned(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe(None, {"max_length": 32, **lora}), config(), named_profile("rtx4090"))
    assert said in str(caught.value)


def changed(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_patterns_of_other_tools_are_read(tmp_path: Path) -> None:
    base = bare()
    patterns = {r"layers\.[12]\.mlp\.up_proj": 3.0, r".*self_attn\.(q|k)_proj": 5, "down_proj": 7}
    model = theirs(base, alpha_pattern=patterns, rank_pattern={".*v_proj": 2}).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(4, 36).view(2, 16)
    loaded = load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    alphas = read_adapter(tmp_path).alphas()
    assert [alphas[f"model.layers.{n}.mlp.up_proj"] for n in range(N_LAYERS)] == [8, 3, 3, 8, 8, 8]


@pytest.mark.parametrize("pattern", ["(a+)+$", ".*.*.*.*x", "(a|b)*", "a{9}", "(?=q)" * 80, "q("])
def test_patterns_that_could_take_long_are_not_matched(pattern: str, tmp_path: Path) -> None:
    save_adapter(ours(bare()), tmp_path)
    with pytest.raises(ModelError, match=r"alpha_pattern: .*; give the adapter folder as PEFT saved it"):
        read_adapter(changed(tmp_path, alpha_pattern={pattern: 2}))


def linears_of(model: nn.Module) -> list[tuple[str, Linear4bit]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_adapters_of_unequal_rank_start_from_what_packing_lost(init: str, tiny_llama: Callable[..., Path]) -> None:
    """Each linear with its adapter is the original as nearly as its own rank allows."""
    from nybble.hardware import detect_device
    from nybble.models import calibrate, find_model, load_model
    from nybble.recipe import ModelSection, QuantizationSection

    section = ModelSection(model_name_or_path=str(tiny_llama()), device="cpu")
    quantization = QuantizationSection(bnb_4bit_compute_dtype="float32", cache=False)
    lora = LoraSection(
        r=4, lora_alpha=8, rank_pattern={"q_proj": 24}, alpha_pattern={"down_proj": 3}, init_lora_weights=init
    )
    source = find_model(section)
    packed, _ = load_model(source, "qlora", section, quantization, detect_device("cpu"))
    original = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    lost = {n: float((m.dequantize() - weight_of(original, n)).norm()) for n, m in linears_of(packed)}
    done = calibrate(packed, source, [], quantization, lora, lambda *_: None)
    model = attach(packed, lora, "base", done.starts)
    left = {}
    for name in lost:
        layer = model.base_model.model.get_submodule(name)
        assert layer.r["default"] == (24 if name.endswith("q_proj") else 4)
        together = layer.base_layer.dequantize() + layer.get_delta_weight("default").detach()
        left[name] = float((together - weight_of(original, name)).norm()) / lost[name]
    assert max(left.values()) < 1
    assert left["model.layers.0.self_attn.q_proj"] < 0.7 * left["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize(
    "whole", [("lm_head",), ("embed_tokens",), ("norm", "layers.1.input_layernorm"), ("lm_head", "norm")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_that_are_trained_whole_are_those_of_peft(
    whole: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    base, padded = bare().to(dtype), [[row] for row in rows()]
    lora = {"modules_to_save": whole, "target_modules": ("q_proj",)}
    mine, stock = ours(base, **lora), theirs(base, **lora)
    masters = {name: parameter.dtype for name, parameter in mine.named_parameters() if parameter.requires_grad}
    assert set(masters.values()) == {torch.float32}
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        expected_loss, expected = gradients(stock, PadBatch(0)(padded))
        loss, found = gradients(mine, FlatBatch()(padded))
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        error = (grad - expected[name].float()).norm() / expected[name].float().norm()
        assert float(error) < 20 * tolerance, name
    save_adapter(mine, tmp_path)
    ids = torch.arange(4, 36).view(2, 16)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        seen, here = loaded(ids).logits, mine.eval()(ids).logits
    torch.testing.assert_close(seen, here, rtol=10 * tolerance, atol=10 * tolerance)
    recipe = load_recipe(None, {"r": 4, "method": "lora", "max_length": 32, **lora})
    plan = make_plan(recipe, config(), named_profile("rtx4090"))
    assert plan.trainable_parameters == sum(p.numel() for p in mine.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": "down_proj"}, "model.layers.0.mlp.down_proj is packed in 4 bits"),
        ({"modules_to_save": "layers.1"}, "model.layers.1 is packed in 4 bits"),
        ({"modules_to_save": "heads"}, "'heads' matches no module, such as model.layers.0"),
        ({"modules_to_save": "embed_tokens", "new_tokens": "<a>"}, "keep one of both"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_when_the_run_is_planned(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe(None, {"max_length": 32, **settings}), config(), named_profile("rtx4090"))
    assert said in str(caught.value)


def test_embeddings_that_share_their_weight_with_the_head_are_not_trained_whole() -> None:
    tied = config()
    tied.tie_word_embeddings = True
    for end in ("lm_head", "embed_tokens"):
        recipe = load_recipe(None, {"max_length": 32, "modules_to_save": end})
        with pytest.raises(RecipeError, match=r"embed_tokens and lm_head share one weight"):
            make_plan(recipe, tied, named_profile("rtx4090"))
