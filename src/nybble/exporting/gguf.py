"""Writes GGUF, one file with weights, vocabulary and settings for llama.cpp and Ollama, with the `gguf` package.

Tensors are read, converted and written one at a time. What differs between families is in `gguf_families`. Of a
multimodal checkpoint the language model is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.errors import CannotRunError, ModelError
from nybble.exporting.arithmetic import AdapterDelta
from nybble.exporting.mixes import LAST_FALLBACK, MIXES, choose_types
from nybble.exporting.vocabulary import read_vocabulary
from nybble.kernels.kquants import fit_blocks
from nybble.models import BaseWeights, ModelSource
from nybble.models.gguf_families import FAMILIES, Change, Family, changed, changes_of, rotation
from nybble.models.gguf_layout import add_settings, name_map, place_of, rotary_factors, text_name
from nybble.quant.kquants import FORMATS, encode_blocks

if TYPE_CHECKING:
    import numpy as np

TYPES = ("f16", "bf16", "q8_0")
_Progress = Callable[[int, int], None]
# Parts of multimodal checkpoints, and heads for several tokens at once, that a language model in GGUF does not have.
_LEFT_OUT = ("vision", "visual", "audio", "projector", "image_newline", "multi_modal", "mtp.", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class _Placed:
    """A tensor of the checkpoint and what becomes of it."""

    name: str  # in the checkpoint
    place: str  # in the file
    shape: tuple[int, ...]
    kind: Any  # a gguf.GGMLQuantizationType
    changes: list[Change]
    wanted: str | None = None  # the type that its rows are too short for


def check_gguf(source: ModelSource) -> Any:
    """Check that the model can be written as GGUF; return the `gguf` package.

    Raises:
        ModelError: this export does not support the architecture, or a setting of it.
        CannotRunError: the package is missing.
    """
    config = source.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"GGUF export does not support the architecture {config.model_type!r}; it supports {', '.join(FAMILIES)}"
        )
    rotations = ("default", "linear", "yarn", "llama3", *family.rotations)
    kind = rotation(config).get("rope_type", "default")
    if kind not in rotations:
        raise ModelError(
            f"GGUF export does not support rotary embeddings of type {kind!r} in this architecture; allowed: "
            f"{', '.join(rotations)}"
        )
    reason = family.refusal(config) if family.refusal else None
    if reason is not None:
        raise ModelError(f"GGUF export does not support {reason}; merge into safetensors instead")
    try:
        import gguf
    except ImportError as error:
        raise CannotRunError("GGUF export needs the package gguf; run pip install 'nybble[gguf]'") from error
    return gguf


def limits_of(source: ModelSource) -> list[str]:
    """What llama.cpp computes otherwise than transformers, for people."""
    config = source.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    if FAMILIES[config.model_type].ignores_windows and uses and window and window < config.max_position_embeddings:
        return [
            f"llama.cpp does not apply this model's window of {window:,} tokens: longer texts are answered otherwise"
        ]
    return []


def write_gguf(
    source: ModelSource,
    tokenizer: Any,
    stop_tokens: tuple[int, ...],
    file: Path,
    outtype: str,
    progress: _Progress,
    importance: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Write the whole model in `source` to `file`; vectors are written in float32.

    `outtype` is one of `TYPES`, or of `nybble.exporting.mixes.MIXES`. For these `importance` says how much an error in
    each column of a matrix matters, by the name of the weight.

    Returns:
        For each tensor of the checkpoint its name, its place in the file, what was changed, its type, and the type that
        the mix wanted where its rows are too short for that, as plain data; a part that is left out has no place.

    Raises:
        ModelError: the architecture, tokenizer or rotary settings cannot be expressed, or a value exceeds float16.
    """
    gguf = check_gguf(source)
    config = source.config.get_text_config()
    family = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(file, family.architecture)
    writer.add_name(source.folder.name)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{outtype.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(gguf, writer, family, config)
    read_vocabulary(tokenizer, config.vocab_size).write(writer, tokenizer, stop_tokens)
    extra = rotary_factors(config)
    with BaseWeights(source) as base:
        kind = "F16" if outtype in MIXES else outtype.upper()
        placed = _places(gguf, base, family, getattr(gguf.GGMLQuantizationType, kind))
        if outtype in MIXES:
            placed = _mixed(gguf, placed, outtype, family.architecture)
        for one in placed:
            block, size = gguf.GGML_QUANT_SIZES[one.kind]
            n_bytes = prod(one.shape) // block * size
            writer.add_tensor_info(one.place, one.shape, _numpy().dtype("float32"), n_bytes, one.kind)
        for place, factors in extra.items():
            writer.add_tensor_info(place, factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, one in enumerate(placed):
            progress(done, len(placed))
            weight = changed(base.read(one.name).float(), one.changes)
            writer.write_tensor_data(_encoded(gguf, weight, one, _importance_of(one, importance or {})))
        for factors in extra.values():
            writer.write_tensor_data(factors)
        left_out = [name for name in base.names() if _is_left_out(name)]
    writer.close()
    progress(len(placed), len(placed))
    written = [
        {"name": one.name, "place": one.place, "changes": one.changes, "type": one.kind.name, "wanted": one.wanted}
        for one in placed
    ]
    return [*written, *({"name": name, "place": None, "changes": []} for name in left_out)]


def write_adapter_gguf(source: ModelSource, folder: Path, file: Path) -> None:
    """Write only the LoRA adapter in `folder`, in float32, for llama.cpp's `--lora`; `source` is its base.

    Raises:
        ModelError: GGUF does not support the architecture or the kind of adapter.
    """
    gguf = check_gguf(source)
    config = source.config.get_text_config()
    family = FAMILIES[config.model_type]
    names = name_map(gguf, family, config)
    with AdapterDelta(folder) as delta:
        more = "DoRA adapters" if delta.is_dora else "adapters with whole modules or rows of tokens"
        if delta.is_dora or delta.saved() or delta.rows:
            raise ModelError(f"{folder}: GGUF does not support {more}; merge it and export the whole model")
        writer = gguf.GGUFWriter(file, family.architecture)
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp multiplies by alpha / r, with one alpha for all layers; B makes up for what a layer's own would be.
        if delta.stacks:
            raise ModelError(f"{folder}: GGUF adapters have no experts; merge it (nybble merge)")
        modules = delta.modules()
        alpha = delta.scalings[modules[0]] * delta.ranks[modules[0]]
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for module in modules:
            place = names.get_name(text_name(module))
            if place is None:
                raise ModelError(f"{folder}: GGUF has no place for {module}")
            a, b = delta.factors(module)
            b *= delta.scalings[module] * delta.ranks[module] / alpha
            changes = changes_of(family, f"{text_name(module)}.weight", config)
            writer.add_tensor(f"{place}.weight.lora_a", changed(a, _of_columns(changes)).contiguous().numpy())
            writer.add_tensor(f"{place}.weight.lora_b", changed(b, _of_rows(changes)).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _of_rows(changes: list[Change]) -> list[Change]:
    return [change for change in changes if change[0] == "rows"]


def _of_columns(changes: list[Change]) -> list[Change]:
    return [change for change in changes if change[0] == "columns"]


def _numpy() -> Any:
    import numpy

    return numpy


def _is_left_out(name: str) -> bool:
    return any(part in name for part in _LEFT_OUT)


def _places(gguf: Any, base: BaseWeights, family: Family, wanted: Any) -> list[_Placed]:
    """The tensors to write; of tied embeddings and head only one, whichever the checkpoint has."""
    config = base.source.config.get_text_config()
    is_tied = config.tie_word_embeddings or family.tied
    names = [name for name in base.names() if not _is_left_out(name)]
    both = is_tied and any("embed_tokens." in name or "word_embeddings." in name for name in names)
    names = [name for name in names if not (both and text_name(name).startswith("lm_head."))]
    places = name_map(gguf, family, config)
    return [_placed(gguf, base, family, name, places, wanted, is_tied=is_tied) for name in names]


def _placed(
    gguf: Any, base: BaseWeights, family: Family, name: str, places: Any, wanted: Any, *, is_tied: bool
) -> _Placed:
    """Matrices whose rows are not whole blocks become float16, vectors and kernels of convolutions float32."""
    config = base.source.config.get_text_config()
    own = text_name(name)
    changes = changes_of(family, own, config)
    place = "token_embd.weight" if is_tied and own == "lm_head.weight" else place_of(places, own)
    if place is None:
        raise ModelError(f"GGUF has no place for the tensor {name}")
    shape = [size for dimension, size in enumerate(base.shape(name)) if ("squeeze", dimension) not in changes]
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or "conv" in place.split(".")[-2]:
        kind = kinds.F32
    else:
        kind = wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else kinds.F16
    return _Placed(name, place, tuple(shape), kind, changes)


def _mixed(gguf: Any, placed: list[_Placed], mix: str, architecture: str) -> list[_Placed]:
    """The same with the types of a mix; vectors and kernels of convolutions stay float32."""
    kinds = gguf.GGMLQuantizationType
    names = {*FORMATS, *MIXES.values(), "Q8_0", LAST_FALLBACK}
    blocks = {name: gguf.GGML_QUANT_SIZES[kinds[name]][0] for name in names}
    shapes = {one.place: one.shape for one in placed if one.kind != kinds.F32}
    chosen = choose_types(mix, shapes, blocks, architecture)
    return [
        replace(one, kind=kinds[chosen[one.place].kind], wanted=chosen[one.place].wanted)
        if one.place in chosen
        else one
        for one in placed
    ]


def _importance_of(one: _Placed, importance: Mapping[str, Tensor]) -> Tensor | None:
    """Of the columns as they are written. Embeddings that are the head as well are seen as the head."""
    name = "lm_head.weight" if one.place in ("token_embd.weight", "output.weight") else text_name(one.name)
    found = {text_name(key): value for key, value in importance.items()}.get(name)
    if found is None or found.shape != one.shape[-1:]:
        return None
    return changed(found.unsqueeze(0), _of_columns(one.changes))[0]


def _encoded(gguf: Any, weight: Tensor, one: _Placed, importance: Tensor | None) -> np.ndarray[Any, Any]:
    if one.kind == gguf.GGMLQuantizationType.F16 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise ModelError(f"{one.name} has values that float16 cannot represent; export as bf16")
    if one.kind.name in FORMATS:
        return encode_blocks(weight.contiguous(), one.kind.name, importance, fit_blocks).numpy()
    result: np.ndarray[Any, Any] = gguf.quants.quantize(weight.contiguous().numpy(), one.kind)
    return result
