"""The families that GGUF is written and read for: their architecture in llama.cpp, what differs from transformers.

Names of tensors are those of the `gguf` package. Here stand the other facts: the settings that llama.cpp reads for an
architecture, and how a tensor of it is arranged. They are those of llama.cpp's own converter and of its loader
(`conversion/*.py` and `src/models/*.cpp` of https://github.com/ggml-org/llama.cpp, 2026-10), and were checked against
that program (docs/evidence/gguf.md). Where transformers rotates the two halves of a head and llama.cpp neighbouring
pairs of its dimensions, the rows of queries and keys are reordered.

What is done to a tensor is data, a list of `Change`s, so that the process that verifies a file can undo it without
importing this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# ("rows", order), ("columns", order), ("plus", number), ("squeeze", dimension), ("minus_exp", None)
Change = tuple[str, Any]
_Settings = Callable[[Any], dict[str, Any]]  # config -> what GGUFWriter.add_NAME is called with, by NAME
_Changes = Callable[[str, Any], list[Change]]  # (name in the checkpoint, config)
_Reason = Callable[[Any], str | None]  # config -> why it cannot be written


@dataclass(frozen=True)
class Family:
    """How a family of transformers is written."""

    architecture: str  # llama.cpp's
    rotates_pairs: bool = False  # llama.cpp rotates neighbouring pairs, transformers the halves
    norms_plus_one: bool = False  # transformers multiplies by 1 + weight
    settings: _Settings | None = None  # beyond those that all architectures have
    changes: _Changes | None = None
    refusal: _Reason | None = None
    rotations: tuple[str, ...] = ()  # kinds of rotary settings besides those that all have
    ignores_windows: bool = False  # llama.cpp attends to all tokens, however far back
    tied: bool = False  # llama.cpp has no head for it


def changed(weight: Tensor, changes: list[Change]) -> Tensor:
    """`weight` as it is written."""
    for kind, value in changes:
        if kind == "rows":
            weight = weight[torch.as_tensor(value)]
        elif kind == "columns":
            weight = weight[:, torch.as_tensor(value)]
        elif kind == "plus":
            weight = weight + value
        elif kind == "squeeze":
            weight = weight.squeeze(value)
        else:
            weight = -torch.exp(weight)
    return weight


def restored(weight: Tensor, changes: list[Change]) -> Tensor:
    """The inverse of `changed`: a tensor of a file as a checkpoint has it."""
    for kind, value in reversed(changes):
        if kind in ("rows", "columns"):
            back = torch.argsort(torch.as_tensor(value))
            weight = weight[back] if kind == "rows" else weight[:, back]
        elif kind == "plus":
            weight = weight - value
        elif kind == "squeeze":
            weight = weight.unsqueeze(value)
        else:
            weight = torch.log(-weight)
    return weight


def changes_of(family: Family, name: str, config: Any) -> list[Change]:
    """What is done to the tensor that is called `name` in a checkpoint."""
    changes: list[Change] = []
    heads = {"q_proj": config.num_attention_heads, "k_proj": vars(config).get("num_key_value_heads")}
    module = name.split(".")[-2] if "." in name else ""
    if family.rotates_pairs and heads.get(module):
        changes.append(("rows", _pairs(heads[module], head_dim(config))))
    if family.norms_plus_one and name.endswith("norm.weight"):
        changes.append(("plus", 1.0))
    if family.changes is not None:
        changes += family.changes(name, config)
    return changes


def head_dim(config: Any) -> int:
    """The width of an attention head."""
    width = vars(config).get("head_dim")  # not an attribute: where layers differ, that is refused
    return int(width or config.hidden_size // config.num_attention_heads)


def rotation(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding; of several kinds of layers, those of full attention."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = rope.get("full_attention")
    return nested if isinstance(nested, dict) else rope


def _local_rotation(config: Any) -> dict[str, Any]:
    rope = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    return {"rope_freq_base_swa": rope["rope_theta"]} if isinstance(rope, dict) and "rope_theta" in rope else {}


def _pairs(heads: int, width: int) -> list[int]:
    """The rows of `heads` heads, in which dimension i of the first half is followed by that of the second."""
    rows: list[int] = torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).flatten().tolist()
    return rows


def _is_sliding(config: Any) -> list[bool]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


def _every(config: Any, period: int) -> bool:
    """Whether each `period`-th layer attends to everything and the others to a window."""
    return _is_sliding(config) == [(layer + 1) % period != 0 for layer in range(config.num_hidden_layers)]


def _alternating(config: Any, period: int) -> str | None:
    if _every(config, period):
        return None
    return (
        f"layers of {config.model_type} in another order than llama.cpp's, which is one of full attention in {period}"
    )


def _gemma2(config: Any) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "sliding_window": config.sliding_window,
    }


def _gemma2_refusal(config: Any) -> str | None:
    if not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "Gemma 2 without its two soft caps"
    return _alternating(config, 2)


def _windows(config: Any) -> dict[str, Any]:
    sliding = _is_sliding(config)
    if not any(sliding):
        return {}
    return {"sliding_window": config.sliding_window, "sliding_window_pattern": sliding, **_local_rotation(config)}


def _gemma3(config: Any) -> dict[str, Any]:
    cap = config.final_logit_softcapping
    return {
        "sliding_window": config.sliding_window,
        **_local_rotation(config),
        **({"final_logit_softcapping": cap} if cap else {}),
    }


def _gemma3_refusal(config: Any) -> str | None:
    if config.attn_logit_softcapping:
        return "Gemma 3 with a soft cap in its attention"
    return _alternating(config, 6)


def _phi3(config: Any) -> dict[str, Any]:
    original = config.original_max_position_embeddings
    settings = {"sliding_window": config.sliding_window or 0, "rope_scaling_orig_ctx_len": original}
    stretch = config.max_position_embeddings / original
    if rotation(config).get("rope_type") == "longrope" and stretch > 1:
        settings["rope_scaling_attn_factors"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    return settings


def _granite(config: Any) -> dict[str, Any]:
    return {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _cohere(config: Any) -> dict[str, Any]:
    return {"logit_scale": config.logit_scale, "rope_scaling_type": "none"}


def _cohere2(config: Any) -> dict[str, Any]:
    return {**_cohere(config), "sliding_window": config.sliding_window}


def _stablelm(config: Any) -> dict[str, Any]:
    return {"parallel_residual": config.use_parallel_residual}


def _stablelm_refusal(config: Any) -> str | None:
    return "StableLM with norms of queries and keys" if config.qk_layernorm else None


def _olmo(config: Any) -> dict[str, Any]:
    return {"layer_norm_eps": 1e-5, **({} if config.clip_qkv is None else {"clamp_kqv": config.clip_qkv})}


def _nemotron(config: Any) -> dict[str, Any]:
    return {"layer_norm_eps": config.norm_eps, "rope_scaling_type": "none"}


def _falcon(config: Any) -> dict[str, Any]:
    return {
        "tensor_data_layout": "jploski",  # the order of query_key_value, below
        "feed_forward_length": config.ffn_hidden_size,
        "head_count_kv": _falcon_kv_heads(config),
    }


def _falcon_kv_heads(config: Any) -> int:
    """The older decoder tells them by a switch."""
    return int(config.num_kv_heads) if config.new_decoder_architecture else 1


def _falcon_changes(name: str, config: Any) -> list[Change]:
    """Groups of queries, a key and a value become all queries, all keys, all values."""
    if "query_key_value" not in name:
        return []
    heads, width, groups = config.num_attention_heads, head_dim(config), _falcon_kv_heads(config)
    rows = torch.arange((heads + 2 * groups) * width).view(groups, -1, width)
    return [("rows", torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()]).tolist())]


def _falcon_refusal(config: Any) -> str | None:
    if config.alibi or not config.parallel_attn or config.bias:
        return "Falcon with ALiBi, biases or an MLP after its attention"
    if not (config.new_decoder_architecture or config.multi_query):
        return "Falcon with as many keys as queries"
    return None


def _exaone4_refusal(config: Any) -> str | None:
    """llama.cpp knows windows, and layers without positions between them, of the model with 64 layers alone."""
    if not any(_is_sliding(config)) or config.num_hidden_layers == 64:
        return _alternating(config, 4) if any(_is_sliding(config)) else None
    return "EXAONE 4 with windows and other than 64 layers"


def _smollm3_refusal(config: Any) -> str | None:
    wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != wanted:
        return "SmolLM3 with other layers without positions than each fourth"
    return "SmolLM3 with windows" if any(_is_sliding(config)) else None


def _ministral_refusal(config: Any) -> str | None:
    return "Ministral with windows, which llama.cpp does not have" if any(_is_sliding(config)) else None


def _ministral3(config: Any) -> dict[str, Any]:
    rope = rotation(config)
    return {
        "rope_scaling_yarn_log_mul": rope["mscale_all_dim"],
        "attn_temperature_scale": rope["llama_4_scaling_beta"],
    }


def _ministral3_refusal(config: Any) -> str | None:
    rope = rotation(config)
    if rope.get("rope_type") != "yarn" or "mscale_all_dim" not in rope or "llama_4_scaling_beta" not in rope:
        return "Ministral 3 without the yarn rotation of its checkpoints"
    return None


def _hunyuan(config: Any) -> dict[str, Any]:
    rope = rotation(config)
    if rope.get("rope_type") != "dynamic":
        return {}
    width = head_dim(config)  # only the base is scaled: the same positions, longer waves
    return {
        "rope_freq_base": rope["rope_theta"] * rope["alpha"] ** (width / (width - 2)),
        "rope_scaling_type": "none",
    }


def _lfm2(config: Any) -> dict[str, Any]:
    attends = [kind == "full_attention" for kind in config.layer_types]
    return {
        "layer_norm_rms_eps": config.norm_eps,
        "shortconv_l_cache": config.conv_L_cache,
        "feed_forward_length": _lfm2_feed_forward(config),
        "head_count_kv": [config.num_key_value_heads if one else 0 for one in attends],
    }


def _lfm2_feed_forward(config: Any) -> int:
    """The width of the MLP, which the config gives before it is adjusted."""
    width = int(config.intermediate_size)
    if not config.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is not None:
        width = int(config.block_ffn_dim_multiplier * width)
    multiple = int(config.block_multiple_of)
    return multiple * ((width + multiple - 1) // multiple)


def _lfm2_changes(name: str, _config: Any) -> list[Change]:
    return [("squeeze", 1)] if name.endswith("conv.conv.weight") else []


def _gemma4(config: Any) -> dict[str, Any]:
    sliding = _is_sliding(config)
    full = config.per_layer_config[sliding.index(False)]
    local = config.per_layer_config[sliding.index(True)] if any(sliding) else full
    settings = {
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": sliding,
        "shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "key_length": full.head_dim,
        "value_length": full.head_dim,
        "key_length_swa": local.head_dim,
        "value_length_swa": local.head_dim,
        "rope_dimension_count": full.head_dim,
        "rope_dimension_count_swa": local.head_dim,
        "head_count_kv": _one_or_all([(local if one else full).num_key_value_heads for one in sliding]),
        **_local_rotation(config),
    }
    if config.final_logit_softcapping:
        settings["final_logit_softcapping"] = config.final_logit_softcapping
    if config.use_double_wide_mlp:
        own, width = config.num_hidden_layers - config.num_kv_shared_layers, config.intermediate_size
        widths = [width if layer < own else 2 * width for layer in range(config.num_hidden_layers)]
        settings["feed_forward_length"] = widths
    return settings


def _one_or_all(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _gemma4_refusal(config: Any) -> str | None:
    if config.enable_moe_block:
        return "Gemma 4 with experts"
    return "Gemma 4 of windows alone" if all(_is_sliding(config)) else None


def _qwen35(config: Any) -> dict[str, Any]:
    sections = [*rotation(config).get("mrope_section", (11, 11, 10)), 0]
    return {
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "ssm_conv_kernel": config.linear_conv_kernel_dim,
        "ssm_state_size": config.linear_key_head_dim,
        "ssm_group_count": config.linear_num_key_heads,
        "ssm_time_step_rank": config.linear_num_value_heads,
        "ssm_inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "rope_dimension_sections": sections[:4],
    }


def _qwen35_refusal(config: Any) -> str | None:
    kinds = list(config.layer_types)
    if "full_attention" not in kinds:
        return "Qwen 3.5 without a layer of full attention"
    interval = kinds.index("full_attention") + 1
    expected = ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(len(kinds))]
    return None if kinds == expected else "Qwen 3.5 with layers in another order than one of full attention in so many"


def _qwen35_changes(name: str, config: Any) -> list[Change]:
    """Heads of values by turns instead of by the head of keys that they share; norms are 1 + weight but for one."""
    changes: list[Change] = []
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        changes.append(("plus", 1.0))
    if name.endswith("conv1d.weight"):
        changes.append(("squeeze", 1))
    keys, values, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    by_turns = _by_turns(keys, values, width)
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        before = 2 * config.linear_key_head_dim * keys
        changes.append(("rows", [*range(before), *(before + row for row in by_turns)]))
    elif name.endswith("in_proj_z.weight"):
        changes.append(("rows", by_turns))
    elif name.endswith("linear_attn.out_proj.weight"):
        changes.append(("columns", by_turns))
    elif name.endswith((".in_proj_a.weight", ".in_proj_b.weight", ".A_log", ".dt_bias")):
        changes.append(("rows", _by_turns(keys, values, 1)))
    if name.endswith(".A_log"):
        changes.append(("minus_exp", None))
    return changes


def _by_turns(keys: int, values: int, width: int) -> list[int]:
    rows: list[int] = torch.arange(values * width).view(keys, values // keys, width).transpose(0, 1).flatten().tolist()
    return rows


def _seed_refusal(config: Any) -> str | None:
    return None if not config.attention_out_bias else "Seed-OSS with a bias after its attention"


FAMILIES: dict[str, Family] = {
    "arcee": Family("arcee", rotates_pairs=True),
    "cohere": Family("command-r", settings=_cohere),
    "cohere2": Family("cohere2", settings=_cohere2, refusal=lambda config: _alternating(config, 4)),
    "ernie4_5": Family("ernie4_5"),
    "exaone4": Family("exaone4", settings=_windows, refusal=_exaone4_refusal),
    "falcon": Family("falcon", settings=_falcon, changes=_falcon_changes, refusal=_falcon_refusal, tied=True),
    "gemma": Family("gemma", norms_plus_one=True, tied=True),
    "gemma2": Family("gemma2", norms_plus_one=True, settings=_gemma2, refusal=_gemma2_refusal, tied=True),
    "gemma3_text": Family("gemma3", norms_plus_one=True, settings=_gemma3, refusal=_gemma3_refusal),
    "gemma4_text": Family("gemma4", settings=_gemma4, refusal=_gemma4_refusal, rotations=("proportional",)),
    "glm4": Family("glm4"),
    "granite": Family("granite", rotates_pairs=True, settings=_granite),
    "hunyuan_v1_dense": Family("hunyuan-dense", settings=_hunyuan, rotations=("dynamic",)),
    "lfm2": Family("lfm2", settings=_lfm2, changes=_lfm2_changes),
    "llama": Family("llama", rotates_pairs=True),
    "ministral": Family("llama", rotates_pairs=True, refusal=_ministral_refusal),
    "ministral3": Family("mistral3", rotates_pairs=True, settings=_ministral3, refusal=_ministral3_refusal),
    "mistral": Family("llama", rotates_pairs=True, ignores_windows=True),
    "nemotron": Family("nemotron", norms_plus_one=True, settings=_nemotron),
    "olmo": Family("olmo", rotates_pairs=True, settings=_olmo),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2", settings=_windows),
    "phi3": Family("phi3", settings=_phi3, rotations=("longrope",), ignores_windows=True),
    "qwen2": Family("qwen2", ignores_windows=True),
    "qwen3": Family("qwen3", ignores_windows=True),
    "qwen3_5_text": Family("qwen35", settings=_qwen35, changes=_qwen35_changes, refusal=_qwen35_refusal),
    "seed_oss": Family("seed_oss", refusal=_seed_refusal),
    "smollm3": Family("smollm3", rotates_pairs=True, refusal=_smollm3_refusal),
    "stablelm": Family("stablelm", settings=_stablelm, refusal=_stablelm_refusal),
    "starcoder2": Family("starcoder2", ignores_windows=True),
}
