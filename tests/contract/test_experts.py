"""Experts in 4 bits in the models of transformers, family by family: packed, read back, adapted, against PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

import nybble
from nybble.errors import ModelError, RecipeError
from nybble.exporting.arithmetic import AdapterDelta, write_merged
from nybble.models import BaseWeights, attach, find_model, load_adapter, save_adapter
from nybble.models.lora_linear import use_our_layer
from nybble.models.quantizer import adopt_bnb, raising_faults
from nybble.models.targets import lora_config
from nybble.nn import Experts4bit, Linear4bit
from nybble.recipe import LoraSection, ModelSection, QuantizationSection
from tools.families.tiny import model_class, tiny_config

# Layouts: one tensor for each expert and part, under two sets of names; fused; transposed with biases, interleaved;
# transposed without its family saying so; without a gate; a gate of another activation.
FEW = ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "nemotron_h", "gemma4_text#moe")
MORE = (
    *(
        "qwen2_moe",
        "qwen3_next",
        "qwen3_5_moe_text",
        "glm4_moe",
        "glm4_moe_lite",
        "deepseek_v2",
        "deepseek_v3",
        "olmoe",
    ),
    *("granitemoehybrid", "granitemoeshared", "lfm2_moe", "phimoe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2"),
    *("afmoe", "flex_olmo", "dots1", "exaone_moe", "cohere2_moe", "mellum", "jamba"),
)
FAMILIES = [*FEW, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE)]
NOISES = ("router_jitter_noise", "input_jitter_noise")  # random in training


def write(family: str, folder: Path) -> Any:
    """A random checkpoint as the hub has them, and its class."""
    config = tiny_config(family)
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = config.vocab_size
    for name in NOISES:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = model_class(family)(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3 or not parameter.any():
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return type(model)


def load(kind: Any, folder: Path) -> Any:
    """The checkpoint in 4 bits: packed on the way, or as it is stored."""
    nybble.register()
    config = AutoConfig.from_pretrained(folder)
    settings: dict[str, Any] = {"config": config}
    if getattr(config, "quantization_config", None):
        stored = {**config.quantization_config, "bnb_4bit_compute_dtype": "float32"}
        config.quantization_config = adopt_bnb(stored)
    else:
        settings["quantization_config"] = nybble.NybbleConfig(encoder="absmax", bnb_4bit_compute_dtype="float32")
    with raising_faults():
        model, info = kind.from_pretrained(folder, **settings, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def decoded_twin(kind: Any, folder: Path, packed: Any) -> Any:
    """transformers' own model with the weights that `packed` decodes."""
    twin = kind.from_pretrained(folder, dtype=torch.float32).eval()
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, Experts4bit):
                for projection in module.stacks:
                    weights[f"{name}.{projection}"].copy_(module.dequantize(projection, torch.float32))
            elif isinstance(module, Linear4bit):
                weights[f"{name}.weight"].copy_(module.dequantize(torch.float32))
    return twin


def adapt(model: Any, stacks: list[str], ours: bool) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=stacks)
    if ours:
        use_our_layer(config)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted.train()


def gradients(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_packed_read_back_and_adapted(family: str, tmp_path: Path) -> None:
    kind = write(family, tmp_path / "base")
    packed = load(kind, tmp_path / "base")
    experts = {name: module for name, module in packed.named_modules() if isinstance(module, Experts4bit)}
    assert experts
    twin = decoded_twin(kind, tmp_path / "base", packed)
    ids = torch.randint(5, 500, (2, 20))
    with torch.no_grad():
        logits = packed(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, twin(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    packed.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        again = load(kind, tmp_path / "packed")(input_ids=ids, use_cache=False).logits
    assert torch.equal(again, logits)

    stacks = [f"{name}.{projection}" for name, module in experts.items() for projection in module.stacks]
    packed.config.model_type = twin.config.model_type = "none"  # PEFT has names of its own for some families
    loss, found = gradients(adapt(packed, stacks, ours=True), ids)
    loss_peft, wanted = gradients(adapt(twin, stacks, ours=False), ids)
    assert loss == pytest.approx(loss_peft, rel=1e-5)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()), msg=name)


# PEFT looks for patterns among modules alone, and uses them for parameters all the same.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
@pytest.mark.parametrize("family", [family for family in FAMILIES if "jamba" not in str(family)])
def test_an_adapter_loads_in_stock_peft_and_is_merged(family: str, tmp_path: Path) -> None:
    """As `all-linear` puts it on, with another rank in one stack; merged into the packed base and into the original."""
    kind = write(family, tmp_path / "base")
    packed = load(kind, tmp_path / "base")
    packed.save_pretrained(tmp_path / "packed")
    twins = [decoded_twin(kind, tmp_path / "base", packed) for _ in range(2)]
    adapted = attach(packed, LoraSection(r=4, rank_pattern={"down_proj": 2}), "a/base").eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    save_adapter(adapted, tmp_path / "adapter")
    ids = torch.randint(5, 500, (2, 20))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    wanted, base = logits(adapted), logits(twins[0])
    assert (wanted - base).abs().max() > 0.01
    close = {"rtol": 1e-4, "atol": 3e-5 * float(wanted.abs().max())}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(twins[1], tmp_path / "adapter")), wanted, **close)
    again = load_adapter(load(kind, tmp_path / "packed"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=0)

    section = QuantizationSection(encoder="absmax", bnb_4bit_compute_dtype="float32")
    original = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    for source, packing, want in (
        ("base", section, wanted),
        ("packed", None, wanted),
        ("base", None, logits(original)),
    ):
        out = tmp_path / "merged"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        found = find_model(ModelSection(model_name_or_path=str(tmp_path / source)))
        weights = BaseWeights(found, packing, torch.float32 if packing else None)
        with weights as opened, AdapterDelta(tmp_path / "adapter") as delta:
            write_merged(opened, delta, out, torch.float32)
        shutil.copyfile(tmp_path / "base" / "config.json", out / "config.json")
        merged, info = kind.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(logits(merged), want, **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_98_percent_of_what_can_be_packed_is_packed(family: str) -> None:
    """What can be: every linear but the head and the routers, and every stack of experts."""
    with torch.device("meta"):
        model = model_class(family)(tiny_config(family))
        head = model.get_output_embeddings()
        linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        n_experts = {4}  # the rows of a router
        sizes = [m.weight.numel() for m in linears if m.out_features not in n_experts]
        sizes += [p.numel() for _, p in model.named_parameters() if p.ndim == 3 and min(p.shape) > 1]
        quantizer = nybble.models.quantizer.NybbleQuantizer(nybble.NybbleConfig())
        quantizer._process_model_before_weight_loading(model)
    modules = list(model.modules())
    packed = sum(m.n_elements for m in modules if isinstance(m, Experts4bit))
    packed += sum(m.in_features * m.out_features for m in modules if isinstance(m, Linear4bit) and m.out_features > 4)
    assert packed >= 0.98 * sum(sizes)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mixtral", ("block_sparse_moe.experts.3.w1", "block_sparse_moe.experts.0.w2")),
        ("qwen3_moe", ("mlp.experts.3.gate_proj", "mlp.experts.0.down_proj")),
        ("granitemoe", ("block_sparse_moe.experts.3.up_proj", "block_sparse_moe.experts.0.down_proj")),
        ("gpt_oss", ("mlp.experts.3.gate_up_proj", "mlp.experts.0.down_proj")),
    ],
)
def test_a_packed_folder_has_a_weight_for_each_expert_under_the_names_of_the_hub(
    family: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    load(write(family, tmp_path / "base"), tmp_path / "base").save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for name in names:
        assert stored[f"model.layers.1.{name}.weight"].dtype == torch.uint8
        assert f"model.layers.1.{name}.weight.absmax" in stored
    quantized = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert quantized["quant_method"] == "bitsandbytes"


def spoil(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_checkpoint_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    kind = write("mixtral", tmp_path)
    spoil(tmp_path, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w3.weight"))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts: the checkpoint has 3 experts' w3, .* says 4"):
        load(kind, tmp_path)


@pytest.mark.parametrize(
    ("family", "tensor", "named"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1.weight", r"mlp\.experts\.2\.w1: .* NaN or infinite"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", r"mlp\.experts\.down_proj: .* NaN or infinite"),
    ],
)
def test_an_expert_that_is_damaged_is_named(family: str, tensor: str, named: str, tmp_path: Path) -> None:
    kind = write(family, tmp_path)
    spoil(tmp_path, lambda t: t[tensor].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(ModelError, match=named):
        load(kind, tmp_path)


def test_experts_that_are_skipped_stay_in_16_bits(tmp_path: Path) -> None:
    kind = write("mixtral", tmp_path)
    nybble.register()
    config = nybble.NybbleConfig(skip_modules=["layers.0.mlp.experts"], encoder="absmax")
    model = kind.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    assert isinstance(model.model.layers[1].mlp.experts, Experts4bit)
    ids = torch.randint(5, 500, (1, 9))
    model.save_pretrained(tmp_path / "packed")
    again = load(kind, tmp_path / "packed")
    assert torch.equal(again.model.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj)
    for module in again.modules():
        module.compute_dtype = torch.bfloat16
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("settings", "stacks"),
    [
        ({}, ["0.gate_up_proj", "0.down_proj", "1.gate_up_proj", "1.down_proj"]),
        ({"exclude_modules": "experts"}, []),
        ({"exclude_modules": "experts.gate_up_proj"}, ["0.down_proj", "1.down_proj"]),
        ({"target_modules": "q_proj,v_proj"}, []),
        ({"target_modules": "q_proj,down_proj"}, ["0.down_proj", "1.down_proj"]),
        ({"target_modules": "experts", "layers_to_transform": "1"}, ["1.gate_up_proj", "1.down_proj"]),
        ({"target_modules": "gate_proj,up_proj"}, ["0.gate_up_proj", "1.gate_up_proj"]),
        ({"target_modules": r".*layers\.0\..*_proj"}, ["0.gate_up_proj", "0.down_proj"]),
    ],
)
def test_experts_are_named_like_linears(settings: dict[str, Any], stacks: list[str]) -> None:
    with torch.device("meta"):
        model = model_class("mixtral")(tiny_config("mixtral"))
    config = lora_config(model, LoraSection.model_validate(settings))
    found = [name.replace("model.layers.", "").replace("mlp.experts.", "") for name in config.target_parameters or ()]
    assert found == stacks
    assert all("gate" not in name.rpartition(".")[2] for name in config.target_modules)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "lora.use_dora: PEFT's adapters on experts do not know it; .* exclude_modules: experts"),
        ({"lora_dropout": 0.1}, "lora.lora_dropout: PEFT's adapters on experts do not know it; .* exclude_modules"),
        (
            {"target_modules": "q_proj,gate_proj"},
            "gate_proj and up_proj of the experts are one stack; name both",
        ),
        (
            {"target_modules": "experts.gate"},
            "'experts.gate' matches no linear layer; this model has ",
        ),
        ({"modules_to_save": "experts"}, "mlp.experts is packed in 4 bits"),
    ],
)
def test_adapters_that_experts_cannot_have_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = load(write("mixtral", tmp_path), tmp_path)
    with pytest.raises(RecipeError, match=message):
        lora_config(model, LoraSection.model_validate(settings))


def test_an_adapter_of_a_base_with_other_experts_is_refused(tmp_path: Path) -> None:
    model = load(write("mixtral", tmp_path / "base"), tmp_path / "base")
    adapted = attach(model, LoraSection(r=2, target_modules="experts"), "a/base")
    save_adapter(adapted, tmp_path / "adapter")
    other = tiny_config("mixtral")
    other.num_local_experts = 8
    model_class("mixtral")(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"it has 4 experts in .*gate_up_proj., and this base 8; give the base"):
        load_adapter(load(model_class("mixtral"), tmp_path / "other"), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "r": 3}))
    with pytest.raises(ModelError, match="is 3, which does not divide its 8 rows; give the adapter folder"):
        load_adapter(load(model_class("mixtral"), tmp_path / "base"), tmp_path / "adapter")
