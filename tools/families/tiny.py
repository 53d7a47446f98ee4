"""A tiny random model of a family, made of its own config class and that class's fields.

    config = tiny_config("qwen3_moe")                      # 2 layers, hidden 64, 4 experts of which 2 answer
    write_tiny("cond:gemma3", folder, tokenizer_dir)       # a multimodal checkpoint as the hub has them

Names are transformers' model types of causal language models; `cond:` is before those of multimodal checkpoints, which
hold a language model and a tower. `#` is before the name of a second shape that checkpoints of the family have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig
from transformers.models.auto import modeling_auto

from tools.families.sizes import EXCEPTIONS, EXCLUDED, FILLED, HEAD_DIM, HEADS, LAYERS, OFF, SIZES

MULTIMODAL = "cond:"
VOCABULARY = 512


def families() -> list[str]:
    """Every family that a tiny model can be built of, by name."""
    shapes = [name for name in EXCEPTIONS if "#" in name]
    return sorted({*_classes(), *shapes} - set(EXCLUDED))


def model_class(model_type: str) -> Any:
    """The class of the family's checkpoints."""
    return getattr(transformers, _classes()[model_type.split("#")[0]])


def tiny_config(model_type: str, vocab_size: int = VOCABULARY) -> Any:
    """The family's config: 2 layers (more where there are more kinds of layers), hidden size 64, 4 experts.

    Raises KeyError for a family that `families()` does not name.
    """
    name = model_type.removeprefix(MULTIMODAL).split("#")[0]
    fields = _tiny_fields(CONFIG_MAPPING[name](), vocab_size, EXCEPTIONS.get(model_type, {}))
    return CONFIG_MAPPING[name](**fields)


def write_tiny(
    model_type: str, folder: str | Path, tokenizer_dir: str | Path, *, vocab_size: int | None = None, seed: int = 0
) -> Path:
    """Write a random float32 checkpoint of the family, and beside it the tokenizer, as a folder of the hub is.

    The vocabulary is as large as the tokenizer's, or has `vocab_size` places. Returns `folder`.
    Weights depend on `seed` alone; torch's own random numbers go on as before.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = tiny_config(model_type, vocab_size or len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_type)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _classes() -> dict[str, str]:
    multimodal = {
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = {name: owner for name, owner in causal.items() if name not in multimodal}
    return found | {MULTIMODAL + name: owner for name, owner in multimodal.items()}


def _tiny_fields(default: Any, vocab_size: int, exceptions: dict[str, Any]) -> dict[str, Any]:
    """What to give to the class of a config, a config nested in it as a dictionary."""
    layers = _layers_kept(default)
    fields: dict[str, Any] = {}
    for name, value in default.__dict__.items():
        if isinstance(value, PretrainedConfig):
            nested = EXCEPTIONS.get(value.model_type, {}) | exceptions.get(name, {})
            fields[name] = {"model_type": value.model_type, **_tiny_fields(value, vocab_size, nested)}
        elif name in layers:
            fields[name] = [value[layer] for layer in layers[name]]
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            fields[name] = {**value, "mrope_section": [2, 3, 3]}
        elif name in FILLED and value is None:
            fields[name] = SIZES[name]
        elif isinstance(value, int) and not isinstance(value, bool) and value not in OFF:
            size = _size(name, value, vocab_size)
            if size is not None:
                fields[name] = size
    if layers and "num_hidden_layers" in fields:
        fields["num_hidden_layers"] = len(next(iter(layers.values())))
    if default.__dict__.get("kv_lora_rank"):
        fields |= _latent_attention(default.__dict__)
    return fields | {name: value for name, value in exceptions.items() if not isinstance(fields.get(name), dict)}


def _size(name: str, value: int, vocab_size: int) -> int | None:
    if name.endswith("vocab_size") or name.startswith("vocab_size"):
        return vocab_size
    if name.endswith(("token_id", "token_index")):
        return value if value < vocab_size else vocab_size - 1
    return SIZES.get(name)


def _latent_attention(default: dict[str, Any]) -> dict[str, int]:
    """Latent attention has keys and values for each head; `head_dim` is the rotated part of a head, or the whole."""
    whole = default.get("head_dim") == default.get("qk_nope_head_dim", 0) + default.get("qk_rope_head_dim", 0)
    return {"num_key_value_heads": HEADS} | ({"head_dim": 2 * HEAD_DIM} if whole else {})


def _layers_kept(default: Any) -> dict[str, list[int]]:
    """Of each list that names a kind per layer, the layers that a tiny model has: one of each kind, in order."""
    count = default.__dict__.get("num_hidden_layers")
    lists = {
        name: value
        for name, value in default.__dict__.items()
        if isinstance(value, list) and len(value) == count and isinstance(value[0], str)
    }
    kinds = list(zip(*lists.values(), strict=True))
    kept = [layer for layer, kind in enumerate(kinds) if kind not in kinds[:layer]]
    rest = [layer for layer in range(len(kinds)) if layer not in kept]
    return dict.fromkeys(lists, sorted(kept + rest[: max(0, LAYERS - len(kept))]))
