"""What transformers, bitsandbytes and Nybble must agree on: which linears are packed, the bytes on disk, the logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nybble.errors import ModelError, RecipeError
from nybble.hardware import detect_device
from nybble.models import NybbleConfig, count_parameters, find_model, load_model, register
from nybble.models.load import LoadReport
from nybble.nn import Linear4bit
from nybble.recipe import ModelSection, QuantizationSection

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

Factory = Callable[..., Path]
IDS = torch.arange(4, 36).view(2, 16)
SOURCES = {
    "float32": {"dtype": torch.float32, "tied": False},
    "float32-tied": {"dtype": torch.float32, "tied": True},
    "bfloat16": {"dtype": torch.bfloat16, "tied": False},
    "bfloat16-tied": {"dtype": torch.bfloat16, "tied": True},
}


@dataclass(frozen=True)
class Pair:
    """One source, packed by Nybble and by bitsandbytes, both saved."""

    source: Path
    ours: Any
    ours_folder: Path
    theirs: Any
    theirs_folder: Path


@pytest.fixture(scope="module", params=SOURCES)
def pair(request: pytest.FixtureRequest, tiny_llama: Factory, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    source = tiny_llama(**SOURCES[request.param])
    ours, theirs = pack(source), stock_pack(source)
    ours_folder, theirs_folder = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    ours.save_pretrained(ours_folder)
    theirs.save_pretrained(theirs_folder)
    return Pair(source, ours, ours_folder, theirs, theirs_folder)


def pack(source: Path, **changes: Any) -> Any:
    register()
    config = NybbleConfig(**{"bnb_4bit_compute_dtype": "float32", "encoder": "absmax", **changes})
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)


def stock_pack(source: Path) -> Any:
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


def load(folder: Path, method: str = "qlora", **changes: Any) -> tuple[Any, LoadReport]:
    section = ModelSection(model_name_or_path=str(folder), device="cpu")
    quantization = QuantizationSection(**{"bnb_4bit_compute_dtype": "float32", "encoder": "absmax", **changes})
    return load_model(find_model(section), method, section, quantization, detect_device("cpu"))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def assert_same_logits(first: Any, second: Any) -> None:
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-5, atol=1e-5)


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    register()
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert (dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
    assert before[1]["nybble"] is NybbleConfig


def test_every_linear_but_the_head_is_packed(pair: Pair) -> None:
    linears = {name: module for name, module in pair.ours.named_modules() if isinstance(module, nn.Linear)}
    plain = [name for name, module in linears.items() if not isinstance(module, Linear4bit)]
    assert plain == ["lm_head"]
    assert len(linears) == 2 * 7 + 1
    assert all(module.is_packed for module in linears.values() if isinstance(module, Linear4bit))


def test_memory_holds_the_packed_weights_and_no_16_bit_ones(pair: Pair) -> None:
    tensors = [*pair.ours.parameters(), *pair.ours.buffers()]
    packed = [module.packed for module in pair.ours.modules() if isinstance(module, Linear4bit)]
    floats = {name for name, parameter in pair.ours.named_parameters() if parameter.is_floating_point()}
    assert {name for name in floats if "norm" not in name} <= {"model.embed_tokens.weight", "lm_head.weight"}
    tied = pair.ours.config.tie_word_embeddings
    embeddings, norms, rope = 128 * 64 * (1 if tied else 2), 5 * 64, 2 * 8
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    # The codes of scales may lie in a run that is not full: at most 255 bytes a weight.
    limit = sum(weight.n_bytes + 255 for weight in packed) + 4 * (embeddings + norms + rope)
    assert sum(held.values()) <= limit


def test_saved_config_is_that_of_bitsandbytes(pair: Pair) -> None:
    ours, theirs = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (pair.ours_folder, pair.theirs_folder)
    )
    names = [name for name in theirs if name.startswith(("bnb_4bit", "quant_method", "load_in", "_load_in"))]
    assert names
    assert {name: ours.get(name) for name in names} == {name: theirs[name] for name in names}
    assert ours.keys() <= theirs.keys()


def test_saved_tensors_are_those_of_bitsandbytes_to_the_byte(pair: Pair) -> None:
    ours, theirs = tensors_in(pair.ours_folder), tensors_in(pair.theirs_folder)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 14 * 6
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def test_both_give_the_same_logits(pair: Pair) -> None:
    assert_same_logits(pair.ours, pair.theirs)


def test_stock_transformers_loads_our_folder(pair: Pair) -> None:
    stock = AutoModelForCausalLM.from_pretrained(pair.ours_folder, dtype=torch.float32)
    assert type(stock.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert_same_logits(stock, pair.ours)


def test_we_load_the_folder_of_bitsandbytes(pair: Pair) -> None:
    model, report = load(pair.theirs_folder)
    assert report.n_packed == 14
    assert "its format stays as it is" in " ".join(report.notes)
    assert_same_logits(model, pair.theirs)


def test_we_load_our_own_folder(pair: Pair) -> None:
    assert_same_logits(load(pair.ours_folder)[0], pair.ours)


def test_we_load_sharded_folders(pair: Pair, tmp_path: Path) -> None:
    for name, model in (("ours", pair.ours), ("theirs", pair.theirs)):
        model.save_pretrained(tmp_path / name, max_shard_size="20kB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        assert_same_logits(load(tmp_path / name)[0], pair.ours)


def test_loader_packs_as_from_pretrained_does(pair: Pair) -> None:
    model, report = load(pair.source)
    assert not model.training
    assert_same_logits(model, pair.ours)
    assert report.left_in_16bit == ("lm_head",)
    assert report.packed_elements == 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert report.bits_per_weight == pytest.approx(4.13, abs=0.15)


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": False},
        {"bnb_4bit_blocksize": 32},
        {"skip_modules": ("q_proj",)},
    ],
    ids=str,
)
def test_other_formats_come_back_from_disk(changes: dict[str, Any], tiny_llama: Factory, tmp_path: Path) -> None:
    model = pack(tiny_llama(), **changes)
    model.save_pretrained(tmp_path)
    assert_same_logits(load(tmp_path)[0], model)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(stock, model)


def test_folder_that_was_loaded_saves_the_same_tensors(tiny_llama: Factory, tmp_path: Path) -> None:
    pack(tiny_llama()).save_pretrained(tmp_path / "first")
    load(tmp_path / "first")[0].save_pretrained(tmp_path / "second")
    first, second = tensors_in(tmp_path / "first"), tensors_in(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_linears_with_a_bias_are_packed_and_kept(tiny_llama: Factory, tmp_path: Path) -> None:
    source = tiny_llama(attention_bias=True)
    tensors = load_file(source / "model.safetensors")
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == 8
    model = AutoModelForCausalLM.from_pretrained(source)  # fresh biases are zero: give them values
    for name in biases:
        nn.init.normal_(model.get_parameter(name))
    model.save_pretrained(tmp_path / "source")
    ours = pack(tmp_path / "source")
    assert_same_logits(ours, stock_pack(tmp_path / "source"))
    ours.save_pretrained(tmp_path / "packed")
    assert_same_logits(load(tmp_path / "packed")[0], ours)


def test_weight_that_is_not_finite_is_named(tiny_llama: Factory, tmp_path: Path) -> None:
    damage(tiny_llama(), tmp_path, "model.layers.1.mlp.up_proj.weight", lambda t: t * float("nan"))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.* NaN or infinite"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["absmax", "nested_absmax", "quant_state.bitsandbytes__nf4"])
def test_packed_weight_with_damaged_companions_is_named(suffix: str, tiny_llama: Factory, tmp_path: Path) -> None:
    pack(tiny_llama()).save_pretrained(tmp_path / "good")
    damage(tmp_path / "good", tmp_path, f"model.layers.1.mlp.up_proj.weight.{suffix}", lambda t: t.repeat(2))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*damaged"):
        load(tmp_path)


def test_missing_tensor_is_named(tiny_llama: Factory, tmp_path: Path) -> None:
    damage(tiny_llama(), tmp_path, "model.layers.1.mlp.up_proj.weight", lambda _: None)
    with pytest.raises(ModelError, match=r"missing tensors: 1, e\.g\. model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)


def damage(good: Path, folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    tensors = load_file(good / "model.safetensors")
    changed = change(tensors.pop(name))
    kept = tensors if changed is None else {**tensors, name: changed}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((good / "config.json").read_text())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_folder_is_refused_by_methods_that_need_16_bits(
    method: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    pack(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=f"stored in 4 bits, but method '{method}' needs 16 bits"):
        load(tmp_path, method)


def test_each_method_keeps_its_number_types(tiny_llama: Factory) -> None:
    source = tiny_llama(dtype=torch.float32)
    kept = {}
    for method in ("qlora", "lora", "full"):
        model, report = load(source, method, bnb_4bit_compute_dtype="bfloat16")
        kept[method] = {parameter.dtype for parameter in model.parameters()}
        assert report.compute_dtype == "bfloat16"
    assert kept == {"qlora": {torch.uint8, torch.bfloat16}, "lora": {torch.bfloat16}, "full": {torch.float32}}


def test_parameters_count_as_what_they_stand_for(tiny_llama: Factory) -> None:
    for tied in (False, True):
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama(tied=tied))
        packed = pack(tiny_llama(tied=tied))
        expected = sum(parameter.numel() for parameter in plain.parameters())
        assert count_parameters(plain) == (expected, expected)
        assert count_parameters(packed)[1] == expected


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_trained_models_load_and_know_their_language(name: str, method: str, shared_data: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared_data / "models" / name
    if not folder.is_dir():
        pytest.skip(f"model {name} is absent")
    model, report = load(folder, method)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert report.total_parameters == sum(parameter.numel() for parameter in plain.parameters())
    story = "Once upon a time, there was a little girl named Lily. She loved to play with her toys."
    ids = AutoTokenizer.from_pretrained(folder)(story, return_tensors="pt").input_ids
    assert model(ids, labels=ids).loss.item() == pytest.approx(plain(ids, labels=ids).loss.item(), abs=0.25)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_kinds_that_cannot_be_packed_are_left_and_listed(tmp_path: Path) -> None:
    from transformers import JetMoeForCausalLM, MixtralForCausalLM

    from tools.families import tiny_config

    MixtralForCausalLM(tiny_config("mixtral")).save_pretrained(tmp_path / "mixtral")
    report = load(tmp_path / "mixtral")[1]
    n_experts, n_layers = 4, 2
    assert report.n_packed == n_layers * (4 + 3 * n_experts)
    # The router is no linear layer.
    assert {name.rpartition(".")[2] for name in report.left_in_16bit} == {"gate", "lm_head"}
    assert not any("experts" in note for note in report.notes)

    JetMoeForCausalLM(tiny_config("jetmoe")).save_pretrained(tmp_path / "jetmoe")
    report = load(tmp_path / "jetmoe")[1]
    assert {"input_linear", "output_linear"} <= {name.rpartition(".")[2] for name in report.left_in_16bit}
    assert any("weights of experts stay in 16 bits: model.layers.0" in note for note in report.notes)
