"""The text models of multimodal checkpoints, family by family, against the whole models of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from nybble.errors import ModelError
from nybble.exporting.arithmetic import AdapterDelta, write_merged
from nybble.hardware import detect_device
from nybble.models import BaseWeights, attach, complete, find_model, load_model, save_adapter, save_whole
from nybble.models.text_part import check_equal, place_of
from nybble.models.towers import tower_keys
from nybble.nn import Experts4bit, Linear4bit
from nybble.recipe import LoraSection, ModelSection, QuantizationSection
from tools.families import write_tiny

# Of each way in which decoder and head are placed, built and multiplied one; the others belong to the long matrix.
CORE = ("gemma3", "llama4", "mistral3", "qwen2_5_vl", "qwen3_5", "smolvlm", "cohere2_vision")
MORE = """aria aya_vision cosmos3_omni deepseek_vl ernie4_5_vl_moe exaone4_5 fuyu gemma4 glm46v glm4v glm4v_moe
    glm_ocr got_ocr2 granite_docling granite_speech hyperclovax_vision_v2 idefics2 idefics3 internvl janus kimi_k25
    lfm2_vl lighton_ocr llava llava_next llava_next_video llava_onevision minicpmv4_6 minimax_m3_vl mistral_large4
    mllama muse_glimmer nemotron_h_omni ovis2 paddleocr_vl paligemma qianfan_ocr qwen2_audio qwen2_vl qwen3_5_moe
    qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe step3p7 video_llama_3 video_llava vipllava voxtral"""
# Parts of experts that transformers puts together have names of their own on disk; they are not followed everywhere.
KNOWN = {
    "peft": {"glm4v_moe", "mistral_large4"},  # linears beside the experts have their names
    "merge": {"minimax_m3_vl"},  # shared experts are stored by parts
    "pack": {"ernie4_5_vl_moe", "minimax_m3_vl"},  # experts for images lie beside those for text; as above
}
FAMILIES = [*CORE, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE.split())]
# transformers' own class of the whole leaves out the factor of the logits that the text model has.
SCALED = {"aya_vision": 0.0625, "cohere2_vision": 0.0625}
IDS = torch.arange(20, 44).view(2, 12)
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(family)` -> folder of a random multimodal model in float32; made once: do not write."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = write_tiny(f"cond:{family}", tmp_path_factory.mktemp(family), tiny_llama())
            (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
            made[family] = folder
        return made[family]

    return make


def skip_known(step: str, family: str) -> None:
    if family in KNOWN[step]:
        pytest.skip(f"{family}: {step} is not followed yet")


def section(folder: Path) -> ModelSection:
    return ModelSection(model_name_or_path=str(folder), device="cpu")


def load(folder: Path, method: str = "lora") -> Any:
    quantization = QuantizationSection(bnb_4bit_compute_dtype="float32")
    source = find_model(section(folder))
    return load_model(source, method, section(folder), quantization, detect_device("cpu"))


def whole(folder: Path) -> Any:
    """The whole model, as stock transformers reads it."""
    name = AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, family: str = "") -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.float()
    return found * SCALED.get(family, 1.0)


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_the_text_model_computes_what_it_does_in_the_whole(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    stock = whole(folder)
    ours, report = load(folder)
    torch.testing.assert_close(logits(ours), logits(stock, family), atol=1e-5, rtol=1e-5)
    assert any("multimodal" in note for note in report.notes)
    names = {name for name, _ in stock.named_parameters()}
    mine = dict(ours.named_parameters())
    assert set(mine) <= names
    place = place_of(stock.config)
    inside = [n for n, _ in stock.named_parameters() if n.startswith((f"{place.decoder}.", f"{place.head}."))]
    assert set(mine) == set(inside)  # no tower


def adapted(folder: Path, out: Path, **lora: Any) -> Any:
    """The text model with an adapter that changes it, which is saved in `out`."""
    ours = attach(load(folder)[0], LoraSection(r=4, **lora), str(folder))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(ours, out)
    return ours.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_the_whole_does(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    ours, stock = load(folder)[0], whole(folder)
    asked = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1]), "do_sample": False, "max_new_tokens": 6}
    assert torch.equal(ours.generate(**asked), stock.generate(**asked))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_loads_in_stock_peft_onto_the_whole(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    from peft import PeftModel

    skip_known("peft", family)
    folder = checkpoint(family)
    ours = adapted(folder, tmp_path)
    theirs = PeftModel.from_pretrained(whole(folder), tmp_path).eval()
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == sum(
        "lora_A" in name for name, _ in ours.named_parameters()
    )
    torch.testing.assert_close(logits(ours), logits(theirs, family), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(ours), logits(whole(folder), family), atol=1e-2)


def test_an_adapter_of_many_modules_is_put_on_none_in_a_tower(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr("peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", 2)
    folder = checkpoint("gemma3")
    ours = adapted(folder, tmp_path)
    theirs = PeftModel.from_pretrained(whole(folder), tmp_path).eval()
    assert not [name for name, _ in theirs.named_parameters() if "lora_A" in name and "language_model" not in name]
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_is_the_whole_model_again(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    skip_known("merge", family)
    folder = checkpoint(family)
    source = find_model(section(folder))
    ours = adapted(folder, tmp_path / "adapter")
    out = tmp_path / "merged"
    out.mkdir()
    with BaseWeights(source) as base, AdapterDelta(tmp_path / "adapter") as delta:
        changes = write_merged(base, delta, out, torch.float32)
    complete(out, source, {"dtype": "float32"}, changes)
    before, after = tensors(folder), tensors(out)
    towers = tower_keys(source.config, before)
    assert set(after) == set(before)
    assert all(same_bytes(before[name], after[name]) for name in towers)
    assert (out / "preprocessor_config.json").is_file()
    stock = whole(out)
    assert type(stock) is type(whole(folder))
    torch.testing.assert_close(logits(stock, family), logits(ours), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapted_head_that_was_tied_is_merged_beside_the_embeddings(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("gemma3")
    source = find_model(section(folder))
    ours = adapted(folder, tmp_path / "adapter", target_modules=("q_proj", "lm_head"))
    out = tmp_path / "merged"
    out.mkdir()
    with BaseWeights(source) as base, AdapterDelta(tmp_path / "adapter") as delta:
        complete(out, source, {"dtype": "float32"}, write_merged(base, delta, out, torch.float32))
    stock = whole(out)
    assert not torch.equal(stock.lm_head.weight, stock.get_input_embeddings().weight)
    torch.testing.assert_close(logits(stock), logits(ours), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_4bit_folder_is_of_the_whole(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    skip_known("pack", family)
    folder = checkpoint(family)
    source = find_model(section(folder))
    packed, _ = load(folder, "qlora")
    save_whole(tmp_path / "packed", packed, transformers.AutoTokenizer.from_pretrained(folder), source)
    before, after = tensors(folder), tensors(tmp_path / "packed")
    towers = tower_keys(source.config, before)
    assert towers or family == "gemma4"  # whose tiny model has none
    assert all(same_bytes(before[name], after[name]) for name in towers)
    assert (tmp_path / "packed" / "preprocessor_config.json").is_file()
    again, _ = load(tmp_path / "packed", "qlora")
    assert torch.equal(logits(again), logits(packed))
    if any(isinstance(module, Experts4bit) for module in packed.modules()) and family != "llama4":
        return  # transformers puts experts together before it could decode them
    stock = whole(tmp_path / "packed")
    place = place_of(source.config)
    theirs = {name for name, module in stock.named_modules() if type(module).__name__ == "Linear4bit"}
    ours = {name for name, module in packed.named_modules() if isinstance(module, Linear4bit)}
    assert ours == {name for name in theirs if ".experts." not in name}  # which are one by one there
    assert all(name.startswith(place.decoder) for name in theirs)


def test_a_missing_tensor_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = checkpoint("gemma3")
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    left = {name: t for name, t in tensors(folder).items() if "layers.1.mlp.up_proj" not in name}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing tensors: 1, e\.g\. model\.language_model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("blip-2", "blip-2 .* does not run on text alone .*pixel_values.*, so it cannot be trained on rows of text"),
        ("florence2", "is a multimodal encoder-decoder of type 'florence2'; give a causal language model"),
        ("idefics", "is a multimodal model without a text model of its own, of type 'idefics'"),
    ],
)
def test_what_cannot_be_trained_on_text_alone_is_named(family: str, message: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match=message):
        load(checkpoint(family))


def test_a_text_model_that_computes_something_else_is_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen2_5_vl")
    ours, _ = load(folder)
    ours.config.final_logit_softcapping = 0.01  # a head that the whole does not have
    with pytest.raises(ModelError, match="treats text in another way than its text model does alone"):
        check_equal(ours, AutoConfig.from_pretrained(folder))
