"""A small model of the same class as a large one: every kind of layer it has, and a few million weights.

What a family's code does is told by its class and its config's flags, not by widths. So a question about the code is
answered with a small model in no time, on a CPU, also where the large one has no weights yet.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

MOST_WEIGHTS = 24_000_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_MOST_LAYERS = 4  # where a config does not list its layers
_MOST_KINDS = 8
# What fields of other sizes are at most in a narrow model, by their names; the first that matches counts.
_MOST = (
    (r"experts?_per_tok|^moe_k$|moe_topk|top_k_experts", 2),
    (r"^n_group$|topk_group", 1),
    (r"^num_(local_)?experts$|n_routed_experts|moe_num_experts", 4),
    (r"index_n_heads", 4),
    (r"intermediate|lora_rank|ffn|n_inner|d_ff|shared_expert", 64),
    (r"vocab_size", 256),
    (r"token_id$", 255),
    (r"max_position_embeddings|n_positions|n_ctx", 4096),
)
_LOCAL = re.compile(r"window|chunk_size|^index_(topk|block)")  # names of how far a token sees, and of sparse attention
WINDOW = 4  # tokens; rows of a proof are longer


def small_models(kind: type, config: Any) -> Iterator[Any]:
    """Random models of class `kind`, float32 on the CPU and frozen, from the one that is most like `config` on.

    The configs that cannot be built, or are too large, are left out. The state of torch's generators does not change.
    """
    for shrink in (_fewer_layers, lambda whole: _narrower(_fewer_layers(whole))):
        with suppress(Exception):  # anything may be wrong with a config that its makers never saw
            cut = shrink(config)
            if _n_weights(kind, cut) <= MOST_WEIGHTS:
                yield _random(kind, cut)


def _n_weights(kind: type, config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())


def _random(kind: type, config: Any) -> Any:
    """A model in whose weights every part matters: none is zero or one, and scores of attention differ."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(copy.deepcopy(config)).float()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.1 * noise)
    return model.requires_grad_(False)


def choice_for(config: Any) -> str | None:
    """The attention of transformers for a model of `config`; None: what it chooses itself.

    Up to 5.17 it lets Gemma 2 have torch's, which leaves the cap on the scores out without a word.
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _fewer_layers(config: Any) -> Any:
    """A copy with as few layers as have all kinds, and rows longer than any window."""
    cut = copy.deepcopy(config)
    cut._attn_implementation = choice_for(config)
    for part in _parts(cut):
        _cut_layers(part)
        for name, value in list(vars(part).items()):
            if _is_number(value) and _LOCAL.search(name):
                setattr(part, name, 1 if name.endswith("blocks") else min(value, WINDOW))
        part.__dict__.pop("quantization_config", None)
    return cut


def _cut_layers(part: Any) -> None:
    n_layers = next((getattr(part, name) for name in _LAYERS if _is_number(getattr(part, name, None))), None)
    if n_layers is None:
        return
    lists = {name: v for name, v in vars(part).items() if isinstance(v, list) and len(v) == n_layers}
    shared = getattr(part, "num_kv_shared_layers", None) or 0  # the last layers, which take keys and values of others
    kinds = [(i >= n_layers - shared, *(str(v[i]) for v in lists.values())) for i in range(n_layers)]
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    kept = first[:_MOST_KINDS] if len(first) > 1 else list(range(min(n_layers, 2 if lists else _MOST_LAYERS)))
    if shared:
        part.num_kv_shared_layers = sum(i >= n_layers - shared for i in kept)
    for name, values in lists.items():
        setattr(part, name, [values[i] for i in kept])
    for name in _LAYERS:
        if _is_number(getattr(part, name, None)):
            with suppress(AttributeError):  # another name for one that is set
                setattr(part, name, len(kept))
    for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if _is_number(getattr(part, name, None)):
            setattr(part, name, min(getattr(part, name), 1))


def _narrower(config: Any) -> Any:
    """A copy with few heads, experts and tokens, and narrow layers; heads stay as wide as they are."""
    cut = copy.deepcopy(config)
    for part in _parts(cut):
        numbers = {name: value for name, value in vars(part).items() if _is_number(value)}
        hidden = next((numbers[name] for name in _HIDDEN if name in numbers), 0)
        heads = next((numbers[name] for name in _HEADS if name in numbers), 0)
        kv = numbers.get("num_key_value_heads") or heads
        few = 4 if kv != heads and kv > 1 else 2
        sizes = {
            **dict.fromkeys(_HIDDEN, few * (hidden // heads) if heads else hidden),
            **dict.fromkeys(_HEADS, few),
            "num_key_value_heads": few if kv == heads else few // 2,
        }
        for name, value in numbers.items():
            setattr(part, name, min(value, sizes.get(name) or _most(name, value)))
        for name, values in list(vars(part).items()):
            if isinstance(values, list) and values and all(map(_is_number, values)):
                setattr(part, name, [min(value, _most(name, value)) for value in values])
    return cut


def _most(name: str, value: int) -> int:
    """The largest size that a field of this name may have in a narrow model."""
    return next((most for names, most in _MOST if re.search(names, name)), value)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
