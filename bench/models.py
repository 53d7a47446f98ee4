"""The models and rows of the measurements: small trained ones from a folder, and random ones that are written here."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMALL_MODELS = ("stories260K", "TinyStories-656K")  # trained Llamas
SMALL_ROWS = ("guanaco-llama2-1k.parquet", "alpaca_style_1100.json")
VOCABULARY = 32000
SEVEN_B_HIDDEN = 4096
STD = 0.02


def small_models(data: Path | None) -> list[str]:
    """The folders of the small trained models below `data`; none without it."""
    return [str(data / "models" / name) for name in SMALL_MODELS] if data else []


def intermediate_size(hidden: int) -> int:
    """About 2.75 times the width, in whole blocks of 64."""
    return hidden * 11 // 4 // 64 * 64


def write_llama(folder: Path, hidden: int, layers: int, tokenizer: Path | None = None) -> Path:
    """A Llama of random bfloat16 weights, with a tokenizer copied from a folder or one of three words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate_size(hidden),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else three_words()
    words.save_pretrained(folder)
    return folder


def three_words() -> PreTrainedTokenizerFast:
    """A placeholder, for models that are never given text."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = {word: number for number, word in enumerate(special.values())}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), **special)


def seven_b(hidden: int, layers: int) -> LlamaConfig:
    """Llama-2-7B's config at a width of 4096 and 32 layers; smaller ones have its proportions."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
    )


def write_seven_b(folder: Path, hidden: int, layers: int) -> int:
    """A checkpoint of that shape with random bfloat16 weights, one shard a layer; the bytes of its weights."""
    folder.mkdir()
    config = seven_b(hidden, layers)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    three_words().save_pretrained(folder)
    shard_of: dict[str, str] = {}
    for index in range(layers + 1):
        tensors = _layer(config, index) if index < layers else _ends(config)
        shard = f"model-{index + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, shard)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _layer(config: LlamaConfig, index: int) -> dict[str, torch.Tensor]:
    """The tensors of a decoder layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    prefix = f"model.layers.{index}."
    return {
        **{f"{prefix}self_attn.{p}_proj.weight": _normal(hidden, hidden) for p in "qkvo"},
        **{f"{prefix}mlp.{p}_proj.weight": _normal(wide, hidden) for p in ("gate", "up")},
        f"{prefix}mlp.down_proj.weight": _normal(hidden, wide),
        f"{prefix}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{prefix}post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }


def _ends(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Embedding, head and last norm."""
    hidden = config.hidden_size
    return {
        "model.embed_tokens.weight": _normal(VOCABULARY, hidden),
        "lm_head.weight": _normal(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }


def _normal(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, STD)
