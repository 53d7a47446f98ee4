"""Self-tests of the 4-bit operators: whether a backend gives the numbers of the torch backend on a device.

Small weights with a short last block are encoded, decoded and multiplied: a backend is used only where this test has
passed. Each function names what differs, or returns None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.kernels.ops4bit import torch as reference
from nybble.kernels.ops4bit.backend import Ops4bitBackend
from nybble.kernels.ops4bit.torch import LowRank
from nybble.quant import PackedWeight
from nybble.quant.search import nest_scales

_QUANT_TYPES = ("nf4", "fp4")


def encoding_differs(backend: Ops4bitBackend, device: torch.device) -> str | None:
    """The first function of the encoder whose bits are not those of the reference."""
    flat = _weights(device)
    for quant_type in _QUANT_TYPES:
        scales = reference.search_scales(flat, quant_type, 64, True)
        nested = (flat, quant_type, 64, scales, *nest_scales(scales))
        if not torch.equal(backend.search_scales(flat, quant_type, 64, True), scales):
            return _differs("search_scales")
        if not torch.equal(backend.nested_codes(*nested), reference.nested_codes(*nested)):
            return _differs("nested_codes")
        nearest = reference.nearest_codes(flat, quant_type, 64, scales)
        if not torch.equal(backend.nearest_codes(flat, quant_type, 64, scales), nearest):
            return _differs("nearest_codes")
        for name in ("feed_back", "descend"):
            if not all(
                map(torch.equal, _columns(backend, name, quant_type, flat), _columns(reference, name, quant_type, flat))
            ):
                return _differs(name)
    return None


def _columns(backend: Any, name: str, quant_type: str, flat: Tensor) -> list[Tensor]:
    """All that a loop over columns returns and writes: 7 of them for 71 outputs, in the middle of a larger matrix."""
    matrix = flat[:169].view(13, 13)
    part = (matrix @ matrix.t() + torch.eye(13, device=flat.device))[3:10, 3:10]
    columns, pull, scales = (flat[k : k + 497].view(7, 71).clone() for k in (0, 300, 600))
    if name == "feed_back":
        return [columns, *backend.feed_back(columns, part, scales, quant_type)]
    return [columns, pull, backend.descend(columns, pull, part, scales, quant_type)]


def decoding_differs(backend: Ops4bitBackend, device: torch.device) -> str | None:
    """The first type to which decoding does not give the bits of the reference."""
    flat = _weights(device)
    for quant_type in _QUANT_TYPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weight = _packed(flat, quant_type, (flat.numel(),), dtype)
            ours = torch.empty_like(flat, dtype=dtype)
            theirs = torch.empty_like(flat, dtype=dtype)
            backend.dequantize(weight, ours)
            reference.dequantize(weight, theirs)
            if not torch.equal(ours, theirs):
                return _differs(f"dequantize to {dtype}")
    return None


def product_differs(backend: Ops4bitBackend, device: torch.device) -> str | None:
    """The first product that is not near that of the reference."""
    flat = _weights(device)
    x, dense = flat[:128].view(2, 64), flat[: 64 * 21].view(21, 64)
    adapter = LowRank(flat[-320:].view(5, 64), flat[-210:-105].view(21, 5), 0.5)
    for quant_type in _QUANT_TYPES:
        square = _packed(flat[: 64 * 21], quant_type, (21, 64), torch.float32)
        for ours, theirs, name in (
            (backend.multiply(x, square), reference.multiply(x, square), "multiply"),
            (backend.multiply(x, square, adapter), reference.multiply(x, square, adapter), "multiply with an adapter"),
            (backend.multiply_dense(x, dense), reference.multiply_dense(x, dense), "multiply_dense"),
        ):
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
                return _differs(name)
    return None


def _differs(name: str) -> str:
    return f"{name} differs from the torch backend"


def _weights(device: torch.device) -> Tensor:
    return torch.sin(torch.arange(64 * 21 + 37, dtype=torch.float32, device="cpu") ** 1.5).to(device)


def _packed(flat: Tensor, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
    scales = reference.search_scales(flat, quant_type, 64, True)
    nested_absmax, offset = nest_scales(scales)
    codes = reference.nested_codes(flat, quant_type, 64, scales, nested_absmax, offset)
    packed = reference.nearest_codes(flat, quant_type, 64, scales)
    return PackedWeight(packed, codes, shape, 64, quant_type, dtype, nested_absmax, offset)
