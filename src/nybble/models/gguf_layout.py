"""What a GGUF file of a family holds besides its weights' values: settings, factors of rotation, names of tensors.

Exports write by it; a GGUF that is taken as a base is read by the same tables.
"""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np

from nybble.models.gguf_families import Family, head_dim, rotation


def add_settings(gguf: Any, writer: Any, family: Family, config: Any) -> None:
    """Add all settings of a model to `writer`, a `gguf.GGUFWriter`."""
    for setting, value in {**_settings(config), **(family.settings(config) if family.settings else {})}.items():
        is_scaling = setting == "rope_scaling_type"
        getattr(writer, f"add_{setting}")(gguf.RopeScalingType(value) if is_scaling else value)


def name_map(gguf: Any, family: Family, config: Any) -> Any:
    """The `gguf` package's table from names in checkpoints to places."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(number, config.num_hidden_layers)


def _settings(config: Any) -> dict[str, Any]:
    """The settings that all architectures have, by their names in GGUFWriter."""
    width = head_dim(config)
    rope = rotation(config)
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "head_count": config.num_attention_heads,
        "head_count_kv": vars(config).get("num_key_value_heads"),
        "key_length": width,
        "value_length": width,
        "layer_norm_rms_eps": getattr(config, "rms_norm_eps", None),
        "vocab_size": config.vocab_size,
        "rope_dimension_count": int(width * (rope.get("partial_rotary_factor") or 1.0)),
        "rope_freq_base": rope["rope_theta"],
        **_rotary_scaling(rope),
    }
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if settings["layer_norm_rms_eps"] is None and hasattr(config, name):
            settings["layer_norm_eps"] = getattr(config, name)
    return {name: value for name, value in settings.items() if value is not None}


def _rotary_scaling(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope_scaling_type": "linear", "rope_scaling_factor": rope["factor"]}
    if kind == "yarn":
        return {
            "rope_scaling_type": "yarn",
            "rope_scaling_factor": rope["factor"],
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
        }
    if kind == "longrope":
        return {"rope_scaling_type": "longrope"}
    return {}


def rotary_factors(config: Any) -> dict[str, Any]:
    """Divisors of the rotary frequencies, each `(half of the rotated dimensions,) float32`, by their place."""
    rope = rotation(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, head_dim(config))}
    if kind == "proportional":
        # Of a head some dimensions are not rotated: their waves are so long that they never turn.
        half = config.per_layer_config[list(config.layer_types).index("full_attention")].head_dim // 2
        turning = int(2 * half * rope.get("partial_rotary_factor", 1.0) / 2)
        return {"rope_freqs.weight": np.array([1.0] * turning + [1e30] * (half - turning), dtype="float32")}
    if kind == "longrope":
        named = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {place: np.array(rope[factors], dtype="float32") for place, factors in named.items()}
    return {}


def _llama3_factors(rope: dict[str, Any], width: int) -> Any:
    """Llama-3's, which stretch long waves."""
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, width, 2):
        turns = context / (2 * pi * rope["rope_theta"] ** (i / width))  # within the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype="float32")


def text_name(name: str) -> str:
    """The name of a tensor of a multimodal checkpoint in the language model alone."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return name.removeprefix("language_model.")


def place_of(places: Any, name: str) -> str | None:
    """Where a tensor is written. Two kinds of parameters are called otherwise than the package expects."""
    renamed = name.replace(".dt_bias", ".dt_proj.bias").replace(".layer_scalar", ".layer_scalar.weight")
    place: str | None = places.get_name(renamed, try_suffixes=(".weight", ".bias"))
    return place
