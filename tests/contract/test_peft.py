"""What PEFT and Nybble must agree on: which linears get adapters, what is trained, and what a saved adapter is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nybble.errors import ModelError, RecipeError
from nybble.models import NybbleConfig, attach, count_parameters, load_adapter, register, save_adapter
from nybble.nn import Linear4bit
from nybble.quant import decode
from nybble.recipe import LoraSection

Factory = Callable[..., Path]
IDS = torch.arange(4, 36).view(2, 16)


def packed_base(source: Path, dtype: torch.dtype = torch.float32) -> Any:
    register()
    config = NybbleConfig(bnb_4bit_compute_dtype=dtype, encoder="absmax")  # what bitsandbytes would pack
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)


def adapted(source: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    model = attach(packed_base(source, dtype), LoraSection(**lora), "a/base")
    # Fresh adapters do nothing (B is zero): give them an effect.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def decoded_base(source: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A stock model whose linears hold what 4 bits hold."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for name, module in packed_base(source, dtype).named_modules():
        if isinstance(module, Linear4bit):
            plain.get_submodule(name).weight.data = decode(module.packed, dtype)
    return plain


def stock_packed_base(source: Path) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    # In training mode and with gradients: bitsandbytes otherwise computes in bfloat16 on some CPUs. No dropout here.
    return model.train()(IDS).logits.detach()


def packed_bytes(model: nn.Module) -> list[Tensor]:
    return [module.weight.clone() for module in model.modules() if isinstance(module, Linear4bit)]


def adapted_linears(model: Any) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_only_adapters_are_trained_and_they_are_float32(tiny_llama: Factory) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = attach(packed_base(tiny_llama(), dtype), LoraSection(), "a/base")
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
        assert all("lora_" not in name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def test_trainable_count_of_rank_8_on_queries_and_values(tiny_llama: Factory) -> None:
    base = packed_base(tiny_llama())
    total = count_parameters(base)[1]
    model = attach(base, LoraSection(r=8, target_modules=("q_proj", "v_proj")), "a/base")
    trainable = 2 * 2 * 8 * (64 + 64)  # layers, projections, rank, in and out
    assert count_parameters(model) == (trainable, total + trainable)
    assert adapted_linears(model) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_adapts_every_linear_but_the_head(tied: bool, tiny_llama: Factory) -> None:
    model = attach(packed_base(tiny_llama(tied=tied)), LoraSection(target_modules="all-linear"), "a/base")
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted_linears(model) == every


def test_one_name_as_text_is_a_target(tiny_llama: Factory) -> None:
    assert adapted_linears(attach(packed_base(tiny_llama()), LoraSection(target_modules="o_proj"), "b")) == {"o_proj"}


def test_unknown_target_is_refused_by_naming_what_exists(tiny_llama: Factory) -> None:
    lora = LoraSection(target_modules=("q_proj", "c_attn"))
    known = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(RecipeError, match=f"'c_attn' matches no linear layer; this model has {known}"):
        attach(packed_base(tiny_llama()), lora, "a/base")


def test_fresh_adapters_change_nothing(tiny_llama: Factory) -> None:
    base = packed_base(tiny_llama())
    before = logits(base)
    assert torch.equal(logits(attach(base, LoraSection(), "a/base")), before)


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_every_gradient_are_finite_and_the_base_stays(
    dtype: torch.dtype, extra: dict[str, Any], tiny_llama: Factory
) -> None:
    model = adapted(tiny_llama(), dtype, r=4, **extra).train()
    before = packed_bytes(model)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in trained)
    torch.optim.AdamW(trained, lr=1e-3).step()
    assert all(torch.equal(a, b) for a, b in zip(before, packed_bytes(model), strict=True))


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_gradients_are_those_over_a_decoded_base(extra: dict[str, Any], tiny_llama: Factory, tmp_path: Path) -> None:
    ours = adapted(tiny_llama(), r=4, **extra)
    save_adapter(ours, tmp_path)
    plain = PeftModel.from_pretrained(decoded_base(tiny_llama()), tmp_path, is_trainable=True)
    for model in (ours, plain):
        model.train()(IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    seen = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert seen.keys() == expected.keys()
    for name, grad in seen.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_rank_stabilized_scale_is_alpha_over_root_r(tiny_llama: Factory) -> None:
    model = attach(packed_base(tiny_llama()), LoraSection(r=16, lora_alpha=8, use_rslora=True), "a/base")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 2.0}


def test_dora_trains_a_magnitude_for_every_output(tiny_llama: Factory) -> None:
    lora = LoraSection(r=4, use_dora=True, target_modules="up_proj")
    model = attach(packed_base(tiny_llama()), lora, "a/base")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.requires_grad
    torch.testing.assert_close(magnitude.detach(), layer.base_layer.dequantize().norm(dim=1))


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 2.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_adapter_works_in_stock_peft_over_the_decoded_base(
    dtype: torch.dtype, extra: dict[str, Any], tiny_llama: Factory, tmp_path: Path
) -> None:
    source = tiny_llama(dtype)
    ours = adapted(source, dtype, r=4, **extra)
    save_adapter(ours, tmp_path)
    stock = PeftModel.from_pretrained(decoded_base(source, dtype), tmp_path)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    # In training both compute the adapter in the compute type; alone, PEFT's would compute it in float32.
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        torch.testing.assert_close(logits(ours), logits(stock), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(logits(stock), logits(decoded_base(source, dtype)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_saved_adapter_works_in_stock_peft_over_bitsandbytes(
    extra: dict[str, Any], tiny_llama: Factory, tmp_path: Path
) -> None:
    ours = adapted(tiny_llama(), r=4, **extra)
    save_adapter(ours, tmp_path)
    stock = PeftModel.from_pretrained(stock_packed_base(tiny_llama()), tmp_path)
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)


def test_adapter_folder_holds_adapters_only_and_names_its_base(tiny_llama: Factory, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_adapter(adapted(tiny_llama(), r=4, lora_alpha=8), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert len(tensors) == 2 * 14
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    facts = {name: config[name] for name in ("base_model_name_or_path", "r", "lora_alpha", "task_type", "peft_type")}
    assert facts == {
        "base_model_name_or_path": "a/base",
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
    }


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}], ids=str)
def test_adapter_comes_back_frozen(extra: dict[str, Any], tiny_llama: Factory, tmp_path: Path) -> None:
    ours = adapted(tiny_llama(), r=4, **extra)
    save_adapter(ours, tmp_path)
    loaded = load_adapter(packed_base(tiny_llama()), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(ours), rtol=0, atol=0)
    assert not [name for name, parameter in loaded.named_parameters() if "lora_" in name and parameter.requires_grad]


def test_an_adapter_is_known_by_its_tensors_not_by_its_patterns(tiny_llama: Factory, tmp_path: Path) -> None:
    """Ranks and names come from the file: a pattern of a stranger's is never matched, a rank never allocated."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **patterns)
    theirs = get_peft_model(packed_base(tiny_llama()), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(theirs, tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "target_modules": "(.*)*(.*)*evil", "rank_pattern": {"(a+)+$": 10**9}}))
    loaded = load_adapter(packed_base(tiny_llama()), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=0, atol=0)
    assert {layer.r["default"] for layer in loaded.modules() if hasattr(layer, "lora_A")} == {2, 4}


def test_pefts_own_merge_is_refused_with_what_to_do(tiny_llama: Factory, tmp_path: Path) -> None:
    ours = adapted(tiny_llama(), r=4)
    save_adapter(ours, tmp_path)
    for model in (ours, load_adapter(packed_base(tiny_llama()), tmp_path)):
        before = packed_bytes(model)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ModelError, match="nybble merge RUN --out DIR"):
                merge()
        assert all(torch.equal(a, b) for a, b in zip(before, packed_bytes(model), strict=True))
    plain = attach(AutoModelForCausalLM.from_pretrained(tiny_llama()), LoraSection(r=4), "a/base")
    assert not hasattr(plain.merge_and_unload(), "peft_config")  # over 16 bits nothing is lost


def test_adapter_of_another_base_is_refused(tiny_llama: Factory, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_llama(), r=4), tmp_path)
    with pytest.raises(ModelError, match="adapter does not fit this base"):
        load_adapter(packed_base(tiny_llama(hidden_size=96)), tmp_path)


def test_folder_without_an_adapter_is_refused(tiny_llama: Factory, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter \(adapter_config.json\)"):
        load_adapter(packed_base(tiny_llama()), tmp_path)


def test_adapter_file_cut_short_is_refused(tiny_llama: Factory, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_llama(), r=4), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_adapter(packed_base(tiny_llama()), tmp_path)


def test_preparing_for_4_bit_training_leaves_the_weights(tiny_llama: Factory) -> None:
    base = packed_base(tiny_llama())
    before, expected = packed_bytes(base), logits(base)
    prepared = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert all(torch.equal(a, b) for a, b in zip(before, packed_bytes(prepared), strict=True))
    assert torch.equal(logits(prepared), expected)


# transformers 5.23 has a newer name, which the oldest supported version lacks.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_adapters_learn_under_gradient_checkpointing_as_without(tiny_llama: Factory) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(tiny_llama(), r=4).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
