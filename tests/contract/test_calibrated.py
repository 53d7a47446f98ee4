"""Calibration and repair on trained models, and what stock transformers + PEFT + bitsandbytes make of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.errors import RecipeError
from nybble.hardware import detect_device
from nybble.models import Calibration, ModelSource, attach, calibrate, find_model, load_model, save_adapter, save_whole
from nybble.models.targets import adapted_linears
from nybble.nn import Linear4bit
from nybble.recipe import LoraSection, ModelSection, QuantizationSection

Factory = Callable[..., Path]
ROWS = [torch.randint(4, 128, (n,)).tolist() for n in (40, 64, 17, 90)]


def calibrated(
    folder: Path, encoder: str = "calibrated", init: str = "default", rows: Any = None, **lora: Any
) -> tuple[Any, Calibration, ModelSource, LoraSection]:
    section = ModelSection(model_name_or_path=str(folder), device="cpu")
    quantization = QuantizationSection(bnb_4bit_compute_dtype="float32", encoder=encoder)
    adapters = LoraSection(init_lora_weights=init, **lora)
    source = find_model(section)
    model, _ = load_model(source, "qlora", section, quantization, detect_device("cpu"))
    steps: list[tuple[int, int]] = []
    done = calibrate(
        model, source, ROWS if rows is None else rows, quantization, adapters, lambda *at: steps.append(at)
    )
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1] == model.config.num_hidden_layers
    return model, done, source, adapters


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(model: Any, reference: Any, windows: Tensor) -> float:
    """Mean KL of the model's predictions from the 16-bit model's, nats per token."""
    with torch.no_grad():
        p, q = (torch.log_softmax(m(windows).logits.float(), -1) for m in (reference, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_calibration_halves_the_damage_on_trained_models(name: str, shared_data: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared_data / "models" / name
    text = (shared_data / "text" / "tinystories_197k.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [tokenizer(text[i : i + 1200]).input_ids[:200] for i in range(0, 48_000, 1200)]
    held_out, reference = torch.tensor(pieces[1::2]), plain(folder)
    kl = {}
    for encoder in ("absmax", "search", "calibrated"):
        model, *_ = calibrated(folder, encoder, rows=pieces[::2])
        kl[encoder] = divergence(model, reference, held_out)
    model, done, _, lora = calibrated(folder, "calibrated", "qera", rows=pieces[::2], r=8)
    kl["qera"] = divergence(attach(model, lora, "base", done.starts), reference, held_out)
    assert kl["search"] < 0.92 * kl["absmax"]
    assert kl["calibrated"] < 0.65 * kl["absmax"]
    assert kl["qera"] < 0.8 * kl["calibrated"]


@pytest.mark.parametrize("init", ["loftq", "qera", "pissa"])
@pytest.mark.parametrize("extra", [{"lora_alpha": 32}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
def test_repaired_models_are_closer_whatever_alpha_is(init: str, extra: dict[str, Any], tiny_llama: Factory) -> None:
    folder = tiny_llama()
    windows = torch.tensor([row[:17] for row in ROWS])
    bare, *_ = calibrated(folder, "search")
    model, done, _, lora = calibrated(folder, "search", init, r=16, **extra)
    repaired = attach(model, lora, "base", done.starts)
    assert len(done.starts) == 14
    assert divergence(repaired, plain(folder), windows) < 0.8 * divergence(bare, plain(folder), windows)


@pytest.mark.parametrize("init", ["default", "loftq", "qera", "pissa"])
def test_stock_peft_over_bitsandbytes_is_the_same_function(init: str, tiny_llama: Factory, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_llama()
    model, done, source, lora = calibrated(folder, "calibrated", init)
    save_whole(tmp_path / "base", model, AutoTokenizer.from_pretrained(folder), source)
    ours = attach(model, lora, str(tmp_path / "base"), done.starts)
    save_adapter(ours, tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert type(stock.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    theirs = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    ids = torch.arange(4, 36).view(2, 16)
    # In training mode and with gradients: bitsandbytes otherwise computes in bfloat16 on some CPUs. No dropout here.
    torch.testing.assert_close(theirs.train()(ids).logits, ours.train()(ids).logits, rtol=1e-4, atol=1e-4)


def test_only_the_adapters_targets_are_repaired(tiny_llama: Factory) -> None:
    model, done, _, lora = calibrated(tiny_llama(), "search", "loftq", target_modules=("q_proj", "v_proj"))
    assert set(done.starts) == set(adapted_linears(model, lora))
    assert len(done.starts) == 4


def test_linears_are_back_in_place_and_untouched_in_form(tiny_llama: Factory) -> None:
    model, done, *_ = calibrated(tiny_llama(dtype=torch.bfloat16))
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(packed) == 14
    assert all(module.packed.is_nested and module.packed.dtype == torch.float32 for module in packed)
    assert not done.left
    assert done.n_tokens == sum(len(row) for row in ROWS)


def test_rows_of_other_lengths_and_windows_of_attention(tiny_llama: Factory, tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    folder = tmp_path / "gemma"
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    model, *_ = calibrated(folder)
    searched, *_ = calibrated(folder, "search")
    windows = torch.tensor([row[:17] for row in ROWS])
    assert divergence(model, plain(folder), windows) < 0.9 * divergence(searched, plain(folder), windows)


def test_without_rows_there_is_nothing_to_calibrate_on(tiny_llama: Factory) -> None:
    with pytest.raises(RecipeError, match="calibration needs rows"):
        calibrated(tiny_llama(), rows=[])


def test_a_4bit_base_cannot_be_calibrated(tiny_llama: Factory, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, _done, source, _lora = calibrated(tiny_llama(), "search")
    save_whole(tmp_path / "packed", model, AutoTokenizer.from_pretrained(tiny_llama()), source)
    with pytest.raises(RecipeError, match="stored in 4 bits: calibration needs the 16-bit weights"):
        calibrated(tmp_path / "packed")
