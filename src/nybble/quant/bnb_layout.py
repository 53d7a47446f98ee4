"""Conversion of packed weights to and from bitsandbytes' safetensors keys.

A packed weight `W` is stored as

    W                              (n / 2, 1) uint8
    W.absmax                       scales: float32, or uint8 under double quantization
    W.quant_map                    (16,) float32, the code values
    W.nested_absmax                float32, under double quantization
    W.nested_quant_map             (256,) float32, under double quantization
    W.quant_state.bitsandbytes__nf4    uint8: JSON of type, block sizes, dtype, shape, offset

Tables are written for other readers, and checked on reading: weights with another table would be decoded wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nybble.guard import shown
from nybble.quant.codebooks import QUANT_TYPES, codebook, dynamic_codebook
from nybble.quant.packed import NESTED_BLOCK_SIZE, PackedWeight

STATE_PREFIX = "quant_state.bitsandbytes__"
# Suffixes of the tensors of one weight; "" stands for the codes themselves.
SUFFIXES = (
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE_PREFIX + name for name in QUANT_TYPES)
)  # fmt: skip
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MOST_OFFSET = torch.finfo(torch.float32).max
_MOST_ELEMENTS = 1 << 62
_MAX_STATE_BYTES = 4096  # a state is about 200 bytes of JSON


def to_bnb(weight: PackedWeight) -> dict[str, Tensor]:
    """Suffix -> tensor, without the codes, which are `weight.packed` and are stored under the weight's own name.

    Tables are copied for each weight, because writers of safetensors refuse tensors that share memory.
    """
    device = weight.packed.device
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {"absmax": weight.absmax, "quant_map": codebook(weight.quant_type).to(device, copy=True)}
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset.item(),
        }
        tensors |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": dynamic_codebook().to(device, copy=True)}
    encoded = json.dumps(state).encode()
    tensors[STATE_PREFIX + weight.quant_type] = torch.tensor(list(encoded), dtype=torch.uint8, device=device)
    return tensors


def from_bnb(packed: Tensor, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> PackedWeight:
    """The weight stored as `packed` with the companions `tensors` (suffix -> tensor).

    Args:
        packed: the codes, any uint8 shape.
        tensors: companions by suffix.
        shape: the shape that the layer expects; it is checked if given.

    Raises:
        ValueError: a companion is missing, of the wrong size, or holds another table.
    """
    states = [key for key in tensors if key.startswith(STATE_PREFIX)]
    if len(states) != 1:
        raise ValueError(f"needs exactly one {STATE_PREFIX}nf4 or {STATE_PREFIX}fp4, found {len(states)}")
    state = _read_state(tensors[states[0]])
    quant_type = states[0].removeprefix(STATE_PREFIX)
    stored_shape = tuple(state["shape"])
    if state["quant_type"] != quant_type:
        raise ValueError(f"key says {quant_type}, state says {shown(state['quant_type'])}")
    if shape is not None and stored_shape != tuple(shape):
        raise ValueError(f"shape {stored_shape} is stored, the layer has {tuple(shape)}")
    if "absmax" not in tensors:
        raise ValueError("absmax is missing")
    _check_table(tensors, "quant_map", codebook(quant_type))
    for name in ("absmax", "nested_absmax"):
        scales = tensors.get(name)
        if scales is not None and scales.is_floating_point() and not scales.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite scales")
    nested: dict[str, Tensor] = {}
    if "nested_blocksize" in state or "nested_absmax" in tensors:
        if "nested_absmax" not in tensors or "nested_offset" not in state:
            raise ValueError("double quantization needs nested_absmax and a nested_offset in the state")
        if state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            raise ValueError(
                f"nested_blocksize must be {NESTED_BLOCK_SIZE}, got {shown(state.get('nested_blocksize'))}"
            )
        _check_table(tensors, "nested_quant_map", dynamic_codebook())
        offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=packed.device)
        nested = {"nested_absmax": tensors["nested_absmax"], "nested_offset": offset}
    return PackedWeight(
        packed.reshape(-1, 1),
        tensors["absmax"].reshape(-1),
        stored_shape,
        state["blocksize"],
        quant_type,
        state["dtype"],
        **nested,
    )


def stored_shape(encoded: Tensor) -> tuple[int, ...]:
    """The shape of a weight before it was packed, read from its `quant_state` alone.

    Raises:
        ValueError: it is not a valid quant state.
    """
    return tuple(_read_state(encoded)["shape"])


def _read_state(encoded: Tensor) -> dict[str, Any]:
    if encoded.dtype != torch.uint8 or encoded.numel() > _MAX_STATE_BYTES:
        raise ValueError(f"quant_state must be at most {_MAX_STATE_BYTES} uint8, got {encoded.numel()} {encoded.dtype}")
    try:
        state = json.loads(bytes(encoded.cpu().reshape(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"quant_state is not JSON ({error})") from error
    if not isinstance(state, dict) or not {"quant_type", "blocksize", "dtype", "shape"} <= state.keys():
        raise ValueError("quant_state must hold quant_type, blocksize, dtype and shape")
    if type(state["blocksize"]) is not int or not 0 < state["blocksize"] <= _MOST_ELEMENTS:
        raise ValueError(f"blocksize must be a positive number, got {shown(state['blocksize'])}")
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not abs(offset) <= _MOST_OFFSET:  # NaN is refused as well
        raise ValueError(f"nested_offset must be a finite number, got {shown(offset)}")
    if not isinstance(state["dtype"], str) or state["dtype"] not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {shown(state['dtype'])}")
    shape = state["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n <= _MOST_ELEMENTS for n in shape):
        raise ValueError(f"shape must be a list of positive numbers, got {shown(shape)}")
    return state | {"dtype": _DTYPES[state["dtype"]]}


def _check_table(tensors: Mapping[str, Tensor], name: str, expected: Tensor) -> None:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    if tensors[name].numel() != expected.numel():
        raise ValueError(f"{name} holds {tensors[name].numel():,} values, bitsandbytes' table has {expected.numel()}")
    table = tensors[name].float().cpu().reshape(-1)
    if not torch.allclose(table, expected, rtol=0, atol=1e-6):
        raise ValueError(f"{name} holds other values than bitsandbytes' table")
