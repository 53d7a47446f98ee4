"""Tiny models of families: small, and of the structure that the family's checkpoints have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForConditionalGeneration

from tools.families import families, tiny_config, write_tiny


def test_families_are_those_of_the_installed_transformers() -> None:
    named = families()
    assert {"llama", "gemma4_text#moe", "qwen3_next", "mamba2", "cond:qwen3_5", "cond:llava"} <= set(named)
    assert "cond:vision-encoder-decoder" not in named
    assert len(named) == len(set(named)) > 150


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("gemma4_text", {"sliding_attention", "full_attention"}),
        ("gemma4_text#shared", {"sliding_attention", "full_attention"}),
        ("gpt_oss", {"sliding_attention", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("jamba", {"linear_attention", "full_attention"}),
        ("bamba", {"linear_attention", "full_attention"}),
        ("lfm2", {"conv", "full_attention"}),
    ],
)
def test_each_kind_of_layer_is_there(family: str, kinds: set[str]) -> None:
    assert set(tiny_config(family).layer_types) == kinds


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"])
def test_of_the_experts_some_answer(family: str) -> None:
    config = tiny_config(family)
    assert config.num_experts_per_tok == 2
    assert getattr(config, "num_local_experts", None) == 4 or config.num_experts == 4


def test_text_and_tower_of_a_multimodal_model_are_tiny() -> None:
    config = tiny_config("cond:qwen3_5", vocab_size=300)
    assert config.text_config.hidden_size == 64
    assert config.text_config.vocab_size == 300
    assert config.vision_config.depth == 2


def test_a_written_model_reads_back_with_its_tokenizer(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    folder = write_tiny("qwen3_moe", tmp_path / "moe", tiny_llama())
    assert torch.equal(before, torch.random.get_rng_state())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 128
    assert sum(p.numel() for p in model.parameters()) < 500_000
    again = AutoModelForCausalLM.from_pretrained(write_tiny("qwen3_moe", tmp_path / "again", tiny_llama()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_multimodal_folder_is_as_the_hub_has_it(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_tiny("cond:gemma3", tmp_path / "gemma3", tiny_llama())
    loaded: Any = Gemma3ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loaded[1]["missing_keys"]
    assert not loaded[1]["unexpected_keys"]
    assert (folder / "config.json").read_text().count('"vision_config"') == 1
