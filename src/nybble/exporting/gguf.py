"""Writes GGUF, one file with weights, vocabulary and settings for llama.cpp and Ollama, with the `gguf` package.

Tensors are read, converted and written one at a time. llama.cpp rotates neighbouring pairs of a head's dimensions,
transformers pairs from its two halves; so for the architecture "llama" the rows of queries and keys are reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.errors import CannotRunError, ModelError
from nybble.exporting.arithmetic import AdapterDelta
from nybble.exporting.vocabulary import read_vocabulary
from nybble.models import BaseWeights, ModelSource

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers -> GGUF
TYPES = ("f16", "bf16", "q8_0")
_Progress = Callable[[int, int], None]


def check_gguf(source: ModelSource) -> Any:
    """Check that the model can be written as GGUF; return the `gguf` package.

    Raises:
        ModelError: this export does not support the architecture.
        CannotRunError: the package is missing.
    """
    if source.config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"GGUF export does not support the architecture {source.config.model_type!r}; it supports "
            f"{', '.join(ARCHITECTURES)}"
        )
    try:
        import gguf
    except ImportError as error:
        raise CannotRunError("GGUF export needs the package gguf; run pip install 'nybble[gguf]'") from error
    return gguf


def write_gguf(
    source: ModelSource, tokenizer: Any, stop_tokens: tuple[int, ...], file: Path, outtype: str, progress: _Progress
) -> None:
    """Write the whole model in `source` to `file`; vectors are written in float32.

    Raises:
        ModelError: the architecture, tokenizer or rotary settings cannot be expressed, or a value exceeds float16.
    """
    gguf = check_gguf(source)
    config = source.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    _write_settings(writer, gguf, config, source.folder.name, outtype)
    read_vocabulary(tokenizer, config.vocab_size).write(writer, tokenizer, stop_tokens)
    names = gguf.get_tensor_name_map(_architecture_number(gguf, architecture), config.num_hidden_layers)
    wanted = getattr(gguf.GGMLQuantizationType, outtype.upper())
    factors = _rotary_factors(config)
    with BaseWeights(source) as base:
        plan = [(name, *_place(gguf, base, name, names, wanted)) for name in _written(base, config)]
        for _name, place, shape, kind in plan:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(place, shape, _numpy().dtype("float32"), prod(shape) // block * size, kind)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, _place_name, _shape, kind) in enumerate(plan):
            progress(done, len(plan))
            writer.write_tensor_data(_encoded(gguf, _ordered(base.read(name).float(), name, config), kind, name))
        if factors is not None:
            writer.write_tensor_data(factors)
    writer.close()
    progress(len(plan), len(plan))


def write_adapter_gguf(source: ModelSource, folder: Path, file: Path) -> None:
    """Write only the LoRA adapter in `folder`, in float32, for llama.cpp's `--lora`; `source` is its base.

    Raises:
        ModelError: GGUF does not support the architecture or the kind of adapter.
    """
    gguf = check_gguf(source)
    config = source.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(_architecture_number(gguf, architecture), config.num_hidden_layers)
    with AdapterDelta(folder) as delta:
        more = "DoRA adapters" if delta.is_dora else "adapters with whole modules or rows of tokens"
        if delta.is_dora or delta.saved() or delta.rows:
            raise ModelError(f"{folder}: GGUF does not support {more}; merge it and export the whole model")
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp multiplies by alpha / r, with one alpha for all layers; B makes up for what a layer's own would be.
        modules = delta.modules()
        alpha = delta.scalings[modules[0]] * delta.ranks[modules[0]]
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for module in modules:
            place = names.get_name(module)
            if place is None:
                raise ModelError(f"{folder}: GGUF has no place for {module}")
            a, b = delta.factors(module)
            b *= delta.scalings[module] * delta.ranks[module] / alpha
            writer.add_tensor(f"{place}.weight.lora_a", a.numpy())
            writer.add_tensor(f"{place}.weight.lora_b", _ordered(b, f"{module}.weight", config).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _numpy() -> Any:
    import numpy

    return numpy


def _architecture_number(gguf: Any, architecture: str) -> Any:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _write_settings(writer: Any, gguf: Any, config: Any, name: str, outtype: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{outtype.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise ModelError(
            f"GGUF export does not support rotary embeddings of type {kind!r}; allowed: default, linear, yarn, llama3"
        )


def _rotary_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Llama-3's divisors of the rotary frequencies, `(head_dim / 2,) float32`, which stretch long waves."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        turns = context / (2 * pi * rope["rope_theta"] ** (i / head_dim))  # within the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return _numpy().array(factors, dtype="float32")  # type: ignore[no-any-return]


def _written(base: BaseWeights, config: Any) -> list[str]:
    """The tensors to write; of tied embeddings and head only one, whichever the checkpoint has."""
    names = [name for name in base.names() if not name.endswith(".rotary_emb.inv_freq")]
    both = config.tie_word_embeddings and any("embed_tokens." in name for name in names)
    return [name for name in names if not (both and name.startswith("lm_head."))]


def _place(gguf: Any, base: BaseWeights, name: str, names: Any, wanted: Any) -> tuple[str, tuple[int, ...], Any]:
    """Name in the file, shape, and type; matrices whose rows are not whole blocks are written in float16."""
    is_tied_head = name == "lm_head.weight" and base.source.config.tie_word_embeddings
    place = "token_embd.weight" if is_tied_head else names.get_name(name, try_suffixes=(".weight", ".bias"))
    if place is None:
        raise ModelError(f"GGUF has no place for the tensor {name}")
    shape = base.shape(name)
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return place, shape, kinds.F32
    return place, shape, wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else kinds.F16


def _ordered(weight: Tensor, name: str, config: Any) -> Tensor:
    """The rows of queries and keys in the order of llama.cpp's rotary embedding, if it differs from transformers'."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[config.model_type] != "llama":
        return weight
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _encoded(gguf: Any, weight: Tensor, kind: Any, name: str) -> np.ndarray[Any, Any]:
    if kind == gguf.GGMLQuantizationType.F16 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise ModelError(f"{name} has values that float16 cannot represent; export as bf16")
    result: np.ndarray[Any, Any] = gguf.quants.quantize(weight.contiguous().numpy(), kind)
    return result
