"""The cases of the planner's measurements: models, recipes, and how many layers are recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.models import find_model
from nybble.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str  # a folder, or the name of a shape below
    method: str = "qlora"
    length: int = 128
    batch: int = 4
    recompute: str = "none"  # none, some or all
    r: int = 8
    targets: str = "all-linear"
    dropout: float = 0.0


def shape(name: str) -> Any:
    """The config of a shape of random weights; all but the tiny one have about 160M."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    }
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "llama-160m": ("llama", {**sizes, "vocab_size": 32000}),
        "llama-tiny": (
            "llama",
            {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 256,
            },
        ),
        "llama-160m-tied": ("llama", {**sizes, "vocab_size": 32000, "tie_word_embeddings": True}),
        "qwen2-160m-wide": (
            "qwen2",
            {
                **sizes,
                "num_hidden_layers": 8,
                "num_key_value_heads": 4,
                "vocab_size": 128256,
                "tie_word_embeddings": True,
            },
        ),
        "gemma3-60m": (
            "gemma3_text",
            {
                **sizes,
                "hidden_size": 512,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "vocab_size": 32000,
                "sliding_window": 64,
            },
        ),
    }
    kind, settings = shapes[name]
    return AutoConfig.for_model(kind, **settings)


def recipe_of(case: Case) -> Recipe:
    """The recipe of a case; two steps."""
    settings = {
        "model_name_or_path": case.model,
        "method": case.method,
        "r": case.r,
        "target_modules": case.targets,
        "lora_dropout": case.dropout,
        "max_length": case.length,
        "per_device_train_batch_size": case.batch,
        "max_steps": 2,
        "cache": "false",
        "report_to": "none",
        "device": "cpu",
    }
    return load_recipe(None, settings)


def depth_of(case: Case, n_layers: int) -> int:
    """Layers that are recomputed."""
    return {"none": 0, "some": n_layers // 2, "all": n_layers}[case.recompute]


def config_of(case: Case, recipe: Recipe) -> Any:
    """The config of a case's model: that of its folder, or of a shape."""
    return find_model(recipe.model).config if Path(case.model).is_dir() else shape(case.model)
