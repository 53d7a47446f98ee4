"""Loading a base model: streamed, and packed to 4 bits on the way."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.errors import ModelError, RecipeError
from nybble.hardware import Device
from nybble.models import packed_cache
from nybble.models.blocks import implementation_of, swap_blocks
from nybble.models.content import content_hash
from nybble.models.experts import unpacked_experts
from nybble.models.quantizer import NybbleConfig, adopt_bnb, raising_faults, register
from nybble.models.skeleton import compute_dtype
from nybble.models.source import ModelSource
from nybble.models.text_part import check_equal, text_class
from nybble.models.towers import complete
from nybble.nn import Experts4bit, Linear4bit
from nybble.recipe import ModelSection, QuantizationSection
from nybble.storage.atomic import atomic_folder, remove_left_overs

SHARD_SIZE = "1GB"  # writing copies a shard's tensors: small ones bound that memory


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a model."""

    n_packed: int  # matrices that are in 4 bits: linears, and of experts one for each expert and part
    packed_elements: int  # weights in them
    packed_bytes: int  # their codes and scales
    left_in_16bit: tuple[str, ...]  # modules with matrices that were not packed: the head, skipped ones, other kinds
    compute_dtype: str
    total_parameters: int
    seconds: float
    notes: tuple[str, ...]  # for people: what was done differently from what was asked

    @property
    def bits_per_weight(self) -> float | None:
        """Bits that a packed weight takes, its share of the scales included."""
        return 8 * self.packed_bytes / self.packed_elements if self.packed_elements else None


def load_model(
    source: ModelSource,
    method: str,
    model: ModelSection,
    quantization: QuantizationSection,
    device: Device,
    on_host: bool = False,
    packed_folder: Path | None = None,
) -> tuple[Any, LoadReport]:
    """The base model for a method, in evaluation mode, on `device` or, with `on_host`, still on the host.

    `qlora` packs every linear except the output head; the rest, and everything under `lora`, has the compute type.
    `full` loads float32, the master weights of a training that computes in the compute type. `packed_folder` holds the
    model in 4 bits already, without its towers and tokenizer.

    Raises:
        RecipeError: the folder is stored in 4 bits, and the method needs 16.
        ModelError: a tensor is damaged or does not fit.
    """
    started = time.monotonic()
    dtype, notes = compute_dtype(quantization.bnb_4bit_compute_dtype, device)
    if source.is_4bit and method != "qlora":
        raise RecipeError(f"{source.name} is stored in 4 bits, but method {method!r} needs 16 bits; use --method qlora")
    if source.is_4bit:
        notes.append("the base is stored in 4 bits: its format stays as it is")
    packs = method == "qlora" and not source.is_4bit and packed_folder is None
    kept = _Kept(source, quantization, dtype) if packs else None
    if kept is not None and kept.folder is not None:
        notes.append("the packed base is taken from the cache")
        packed_folder = kept.folder
    files = source if packed_folder is None else _stored(source, packed_folder)
    place = torch.device("cpu") if on_host else device.torch_device
    loaded = _from_pretrained(files, method, model, _packing(files, method, quantization, dtype), place, dtype)
    packed = [m.packed for m in loaded.modules() if isinstance(m, Linear4bit)]
    experts = [m for m in loaded.modules() if isinstance(m, Experts4bit)]
    if method == "qlora" and not packed:
        raise ModelError(f"{source.name} has no linear layer that can be packed; use --method lora or full")
    loaded.eval()
    notes += [_multimodal_note(source, loaded)] if source.is_multimodal else []
    blocks = swap_blocks(loaded, model.attn_implementation)
    notes += [blocks.reason] if blocks.reason else []
    notes += unpacked_experts(loaded) if method == "qlora" else []
    if kept is not None:
        notes += kept.keep(loaded)
    report = LoadReport(
        n_packed=len(packed) + sum(module.n_packed for module in experts),
        packed_elements=sum(weight.n_elements for weight in packed) + sum(module.n_elements for module in experts),
        packed_bytes=sum(weight.n_bytes for weight in packed) + sum(module.n_bytes for module in experts),
        left_in_16bit=tuple(_not_packed(loaded)) if packed else (),
        compute_dtype=str(dtype).removeprefix("torch."),
        total_parameters=count_parameters(loaded)[1],
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )
    return loaded, report


def hash_of(quantization: QuantizationSection) -> Callable[[Path], str]:
    """`content_hash` of a file; with a cache, it is remembered on disk until the file changes."""
    return packed_cache.PackedCache(quantization.cache_limit).content if quantization.cache else content_hash


def cached_source(source: ModelSource, quantization: QuantizationSection, dtype: torch.dtype) -> ModelSource:
    """The same model in its packed form if the cache has it, else `source`."""
    kept = _Kept(source, quantization, dtype)
    return source if kept.folder is None else _stored(source, kept.folder)


class _Kept:
    """The packed form of `source` in the cache."""

    def __init__(self, source: ModelSource, quantization: QuantizationSection, dtype: torch.dtype) -> None:
        size = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
        self._wanted = quantization.cache and size >= packed_cache.SMALLEST
        self.folder: Path | None = None
        if self._wanted:
            self._cache = packed_cache.PackedCache(quantization.cache_limit)
            settings = quantization.model_dump(exclude={"cache", "cache_limit", "calibration_rows"})
            settings |= {"encoder": "absmax" if quantization.encoder == "absmax" else "search", "dtype": str(dtype)}
            self._key = self._cache.key(source.folder, settings)
            self.folder = self._cache.find(self._key)

    def keep(self, model: Any) -> list[str]:
        """Write the packed model unless it was read from here; returns a note if it could not be written."""
        if not self._wanted or self.folder is not None:
            return []
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
        size = sum(t.numel() * t.element_size() for t in tensors)
        why_not = self._cache.store(self._key, size, partial(model.save_pretrained, max_shard_size=SHARD_SIZE))
        return [f"the packed base {why_not}"] if why_not else []


def _multimodal_note(source: ModelSource, loaded: Any) -> str:
    """Prove that the text model is that of the multimodal one, and say what was loaded."""
    factor = check_equal(loaded, source.config)
    loaded.logit_factor = factor
    kind = source.config.model_type
    note = f"the text model of a multimodal {kind} checkpoint is trained alone; its towers are not loaded"
    if factor != 1:
        note += f" (transformers' {kind} class leaves out the factor {factor:g} of its logits, which is applied here)"
    return note


def _stored(source: ModelSource, folder: Path) -> ModelSource:
    """The same model under the same name, to be read from its packed form in `folder`."""
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return replace(source, folder=folder, quantization=quantization)


def _packing(source: ModelSource, method: str, quantization: QuantizationSection, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `from_pretrained` with which our quantizer packs, or reads what is packed."""
    if method != "qlora":
        return {}
    register()
    if source.quantization is None:
        config = packing_config(quantization, dtype)
        return {"config": source.text_config, "quantization_config": config}
    config = copy.deepcopy(source.text_config)
    config.quantization_config = adopt_bnb(
        {**source.quantization, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    )
    return {"config": config}


def packing_config(quantization: QuantizationSection, dtype: torch.dtype) -> NybbleConfig:
    """How a 16-bit checkpoint is packed while it is loaded."""
    return NybbleConfig(
        quantization.bnb_4bit_quant_type,
        quantization.bnb_4bit_use_double_quant,
        dtype,
        quantization.bnb_4bit_blocksize,
        quantization.skip_modules,
        # Linears that calibration does not reach keep what `search` gives them.
        "absmax" if quantization.encoder == "absmax" else "search",
        quantization.signed_scales,
    )


def _not_packed(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, Linear4bit | Experts4bit | nn.Embedding)
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    ]


def _from_pretrained(
    source: ModelSource,
    method: str,
    model: ModelSection,
    packing: dict[str, Any],
    place: torch.device,
    dtype: torch.dtype,
) -> Any:
    from transformers import AutoModelForCausalLM

    remote = {} if source.is_multimodal else {"trust_remote_code": model.trust_remote_code}
    cls = text_class(source.config) if source.is_multimodal else AutoModelForCausalLM
    try:
        with raising_faults():
            loaded, info = cls.from_pretrained(
                source.folder,
                **{"config": source.text_config, **packing, **remote},
                dtype=torch.float32 if method == "full" else dtype,
                device_map={"": place},
                attn_implementation=implementation_of(model, source.text_config),
                use_safetensors=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, ImportError) as error:
        raise ModelError(f"{source.name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{source.name}: missing tensors: {len(missing)}, e.g. {missing[0]}; download it again")
    return loaded


def save_whole(folder: Path, model: Any, tokenizer: Any, source: ModelSource) -> None:
    """Write model and tokenizer to the new `folder`, which appears either complete or not at all.

    `source` is what the model was loaded from; of a multimodal one, the towers are copied.
    """
    remove_left_overs(folder.parent, of=folder)
    with atomic_folder(folder) as unfinished:
        write_whole(unfinished, model, tokenizer, source)


def write_whole(folder: Path, model: Any, tokenizer: Any, source: ModelSource) -> None:
    """Write model and tokenizer into `folder`, in the architecture of `source`."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    if source.is_multimodal:
        now, before = model.config, source.text_config
        settings = {name: getattr(now, name) for name in ("vocab_size", "tie_word_embeddings")}
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        complete(folder, source, saved, {n: value for n, value in settings.items() if value != getattr(before, n)})


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; a packed weight counts as the weights it stands for, and tied ones count once."""
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    experts = [module for module in model.modules() if isinstance(module, Experts4bit)]
    bytes_of_packed = {id(tensor) for module in packed for tensor in (module.weight, module.absmax)}
    bytes_of_packed |= {id(tensor) for module in experts for tensor in module.packed_tensors()}
    plain = [parameter for parameter in model.parameters() if id(parameter) not in bytes_of_packed]
    total = sum(m.in_features * m.out_features for m in packed) + sum(m.n_elements for m in experts)
    total += sum(p.numel() for p in plain)
    return sum(p.numel() for p in plain if p.requires_grad), total
