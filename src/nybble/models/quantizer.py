"""The quantizer: Nybble as a quantization method of transformers.

    import nybble
    nybble.register()
    AutoModelForCausalLM.from_pretrained(path, quantization_config=nybble.NybbleConfig())

transformers reads one tensor, passes it to our operation, and drops it before it reads the next; so host memory holds
the packed model plus one tensor. Registration is an explicit call, may be repeated, and adds one entry to each of the
two tables that transformers has for this purpose. Folders written by `save_pretrained` carry bitsandbytes' keys and
`quantization_config`, so that stock transformers + bitsandbytes and vLLM read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from nybble.errors import ModelError
from nybble.kernels import ENCODERS, quantize
from nybble.models.experts import (
    GatherExpert,
    conversions_for_experts,
    experts_to_pack,
    pack_stack,
    swap_experts,
)
from nybble.models.skeleton import linears_to_pack, swap_linears
from nybble.nn import Experts4bit, Linear4bit
from nybble.quant import BLOCK_SIZES, NESTED_BLOCK_SIZE, QUANT_TYPES, SUFFIXES, PackedWeight, from_bnb

METHOD = "nybble"


class NybbleConfig(QuantizationConfigMixin):
    """How to pack, with bitsandbytes' names and meanings.

    Args:
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: store scales in 8 bits.
        bnb_4bit_compute_dtype: type of the products.
        bnb_4bit_blocksize: weights that share a scale.
        skip_modules: linears to leave as they are, besides the output head.
        encoder: "search" for scales of least error, "absmax" for bitsandbytes' own codes; the same bytes to a reader.
        signed_scales: whether a searched scale may be negative.
    """

    def __init__(
        self,
        bnb_4bit_quant_type: str = "nf4",
        bnb_4bit_use_double_quant: bool = True,
        bnb_4bit_compute_dtype: torch.dtype | str = torch.bfloat16,
        bnb_4bit_blocksize: int = 64,
        skip_modules: tuple[str, ...] | list[str] = (),
        encoder: str = "search",
        signed_scales: bool = True,
        **_others: Any,  # keys of bitsandbytes' dictionary that say nothing about 4 bits
    ) -> None:
        if bnb_4bit_quant_type not in QUANT_TYPES:
            raise ValueError(f"bnb_4bit_quant_type must be one of {QUANT_TYPES}, got {bnb_4bit_quant_type!r}")
        if bnb_4bit_blocksize not in BLOCK_SIZES:
            raise ValueError(f"bnb_4bit_blocksize must be one of {BLOCK_SIZES}, got {bnb_4bit_blocksize}")
        if encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {ENCODERS}, got {encoder!r}")
        self.quant_method = METHOD
        self.encoder = encoder
        self.signed_scales = signed_scales
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        dtype = bnb_4bit_compute_dtype
        self.bnb_4bit_compute_dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        self.bnb_4bit_blocksize = bnb_4bit_blocksize
        self.skip_modules = list(skip_modules)
        self.left_alone: list[str] = []  # linears that were not packed; filled while loading
        self.experts_left_alone: list[str] = []  # modules of experts that were not packed; filled while loading

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """A 16- or 32-bit weight in this format.

        Raises:
            ValueError: it is not finite.
        """
        return quantize(
            weight,
            self.bnb_4bit_quant_type,
            self.bnb_4bit_blocksize,
            self.bnb_4bit_use_double_quant,
            self.encoder,
            self.signed_scales,
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that bitsandbytes would write into config.json."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": str(self.bnb_4bit_compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted({*self.skip_modules, *self.left_alone, *self.experts_left_alone}) or None,
        }


def adopt_bnb(stored: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a bitsandbytes 4-bit folder, renamed so that transformers passes it to us."""
    names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    known = {name: stored[name] for name in names if name in stored}
    return {"quant_method": METHOD, "skip_modules": stored.get("llm_int8_skip_modules") or [], **known}


class NybbleQuantizer(HfQuantizer):
    """Swaps linears and experts for ours before loading and packs (or unpacks keys) while loading."""

    requires_calibration = False
    quantization_config: NybbleConfig
    _loading: nn.Module

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a packed weight with its share of the scales: what transformers asks the device for beforehand.

        Without it that is 2, and a model that fits is refused as out of memory before its first tensor is read.
        """
        config = self.quantization_config
        scale = 1 + 4 / NESTED_BLOCK_SIZE if config.bnb_4bit_use_double_quant else 4
        return 0.5 + scale / config.bnb_4bit_blocksize

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """True for a tensor of the checkpoint that is to be packed."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, Experts4bit):
            return name in module.stacks
        return isinstance(module, Linear4bit) and name == "weight"

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self._loading = model
        config = self.quantization_config
        names, config.left_alone = linears_to_pack(model, config.skip_modules)
        swap_linears(model, names, config.bnb_4bit_compute_dtype)
        experts, config.experts_left_alone = experts_to_pack(model, config.skip_modules)
        swap_experts(model, experts, config.bnb_4bit_compute_dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # On saving, transformers would undo these conversions; our state dict already has the file's keys.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            c for c in conversions if not any(isinstance(op, _Unpack | GatherExpert) for op in _operations(c))
        ]  # type: ignore[assignment]
        del self._loading  # the config keeps the quantizer alive
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT, accelerate and TRL read this
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """The operation for a 16- or 32-bit tensor."""
        return _Pack(self.quantization_config)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The operation that gathers the keys of a weight that is stored in 4 bits."""
        if not self.pre_quantized:
            return []
        sources = [*(f"weight.{suffix}" for suffix in SUFFIXES), "weight"]
        return [WeightConverter(source_patterns=sources, target_patterns="weight", operations=[_Unpack(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """The family's conversions with those of packed experts in their place, and those of what is in 4 bits.

        transformers names the model since a release after 5.17, so the one that is being loaded is remembered.
        """
        model = self._loading if model is None else model
        gather = GatherExpert(self.quantization_config.pack, _fault, self if self.pre_quantized else None)
        ours = conversions_for_experts(weight_conversions, model, gather, self.pre_quantized)
        return [*ours, *self.get_weight_conversions()]

    def is_serializable(self) -> bool:
        """True: `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters on top of the model can be trained."""
        return True


# transformers turns what an operation raises into a line of a log; the loader needs the error itself.
_faults: ContextVar[list[ModelError] | None] = ContextVar("nybble_faults", default=None)


@contextmanager
def raising_faults() -> Iterator[None]:
    """Within, an error in packing or unpacking a tensor is raised as it is, not as transformers reports it.

    Raises:
        ModelError: a tensor is not finite, or its 4-bit companions do not fit.
    """
    found: list[ModelError] = []
    token = _faults.set(found)
    try:
        yield
    except RuntimeError as error:
        if found:
            raise found[0] from error
        raise
    finally:
        _faults.reset(token)


def _fault(name: str, error: ValueError) -> ModelError:
    fault = ModelError(f"{name}: {error}; the checkpoint is damaged or of another model: download it again")
    found = _faults.get()
    if found is not None:
        found.append(fault)
    return fault


def _operations(conversion: Any) -> list[Any]:
    return list(getattr(conversion, "operations", ()))  # a conversion that only renames has none


class _Pack(ConversionOps):
    def __init__(self, config: NybbleConfig) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, nn.Parameter]:
        (name, value), *_others = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        layer, projection = get_module_from_name(model, name)
        try:
            if isinstance(layer, Experts4bit):
                codes = pack_stack(layer, projection, weight, self.config.pack)
            else:
                layer.set_packed(self.config.pack(weight.t().contiguous() if layer.stored_transposed else weight))
                codes = layer.weight
        except ValueError as error:
            raise _fault(name, error) from error
        layer._is_hf_initialized = True
        return {name: codes}


class _Unpack(ConversionOps):
    def __init__(self, hf_quantizer: NybbleQuantizer) -> None:
        # This attribute tells transformers that the tensors are converted here, so that it does not round the
        # float32 scales to the model's type on reading.
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Any]:
        if len(input_dict) == 1:  # a weight that is stored in 16 bits
            return input_dict
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        packed = tensors.pop("weight")
        companions = {key.removeprefix("weight."): tensor for key, tensor in tensors.items()}
        layer, _name = get_module_from_name(model, full_layer_name)
        try:
            layer.set_packed(from_bnb(packed, companions, (layer.out_features, layer.in_features)))
        except ValueError as error:
            raise _fault(full_layer_name, error) from error
        layer._is_hf_initialized = True
        return {"weight": layer.weight}


def register() -> None:
    """Register the method "nybble" with transformers; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(NybbleConfig)
        register_quantizer(METHOD)(NybbleQuantizer)
