"""transformers' config of a model of a known shape."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from nybble.recipe.shapes import SHAPES


def config_of(key: str) -> Any:
    """transformers' config of a shape in SHAPES."""
    shape = SHAPES[key]
    settings: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.positions,
        "sliding_window": shape.window,
    }
    if shape.experts:
        settings |= {
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_intermediate,
        }
    if shape.kind in ("phi3", "qwen2"):
        del settings["head_dim"]  # follows from hidden and heads
    if shape.kind == "phi3":
        settings["pad_token_id"] = None
    return AutoConfig.for_model(shape.kind, **settings)
