"""Which code runs the operators on a device: the fastest path that is there."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from nybble.kernels import cpu, plain
from nybble.quant import PackedWeight, Steps
from nybble.quant.search import nest_scales

OPERATORS = ("dequantize_4bit", "dequantize_4bit_out", "gemv_4bit", "quantize_4bit")


class Path(Steps, Protocol):
    """What a path must offer: the loops of the encoder, and these. All results are bit-identical but sums."""

    NAME: str  # as run.json shows it

    def dequantize(self, weight: PackedWeight, out: Tensor) -> None:
        """Decode `weight` into `out`: contiguous, `weight.shape`, float32, float16 or bfloat16."""

    def multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """x W^T, `(rows, out_features)` in the type of x, for contiguous x of at most 8 rows."""


def path_for(device: torch.device) -> Path:
    """The path that the operators take on `device`."""
    return _path_of_kind(device.type)[0]


def paths_taken(device: torch.device) -> dict[str, str]:
    """Operator -> name of the path that it takes on `device`."""
    return dict.fromkeys(OPERATORS, path_for(device).NAME)


def path_reasons(device: torch.device) -> dict[str, str]:
    """Operator -> why it does not take the fast path of `device`; empty where it does."""
    reason = _path_of_kind(device.type)[1]
    return dict.fromkeys(OPERATORS, reason) if reason else {}


@cache
def _path_of_kind(kind: str) -> tuple[Path, str | None]:
    """The path, and why it is not the fast one of this kind of device, in words."""
    plainest = cast(Path, plain)
    if kind == "cpu":
        missing = cpu.unavailable()
        fast = cast(Path, cpu)
    elif kind == "cuda":  # ROCm calls itself so too
        missing = None if find_spec("triton") else "triton is not installed"
        fast = cast(Path, import_module("nybble.kernels.gpu")) if missing is None else plainest
    else:
        return plainest, f"there is no fast path for {kind}"
    wrong = missing or self_test(fast, torch.device(kind))
    return (plainest, wrong) if wrong else (fast, None)


def self_test(path: Path, device: torch.device) -> str | None:
    """What is wrong with `path` on `device`, in words; None if it gives the bits of the plain one.

    Small weights with a short last block are encoded and decoded: a path is only taken where it has been seen to work.
    """
    flat = torch.sin(torch.arange(64 * 21 + 37, dtype=torch.float32, device="cpu") ** 1.5).to(device)
    try:
        for quant_type in ("nf4", "fp4"):
            wrong = _differs(path, flat, quant_type)
            if wrong:
                return f"self-test of the {path.NAME} path failed: {wrong} differs from the plain path"
    except Exception as error:  # noqa: BLE001 - a compiler or driver may fail in any way; the plain path then runs
        return f"self-test of the {path.NAME} path failed: {type(error).__name__}: {error}"
    return None


def _differs(path: Path, flat: Tensor, quant_type: str) -> str | None:
    """The first function whose result is not the plain path's."""
    scales = plain.search_scales(flat, quant_type, 64, True)
    nested_absmax, offset = nest_scales(scales)
    nested = (flat, quant_type, 64, scales, nested_absmax, offset)
    codes, packed = plain.nested_codes(*nested), plain.nearest_codes(flat, quant_type, 64, scales)
    if not torch.equal(path.search_scales(flat, quant_type, 64, True), scales):
        return "search_scales"
    if not torch.equal(path.nested_codes(*nested), codes):
        return "nested_codes"
    if not torch.equal(path.nearest_codes(flat, quant_type, 64, scales), packed):
        return "nearest_codes"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = PackedWeight(packed, codes, (flat.numel(),), 64, quant_type, dtype, nested_absmax, offset)
        ours, theirs = torch.empty_like(flat, dtype=dtype), torch.empty_like(flat, dtype=dtype)
        path.dequantize(weight, ours)
        plain.dequantize(weight, theirs)
        if not torch.equal(ours, theirs):
            return f"dequantize to {dtype}"
    n = 64 * 21
    square = PackedWeight(
        packed[: n // 2], codes[:21], (21, 64), 64, quant_type, torch.float32, nested_absmax[:1], offset
    )
    x = flat[:128].view(2, 64)
    if not torch.allclose(path.multiply(x, square), plain.multiply(x, square), rtol=1e-4, atol=1e-4):
        return "multiply"
    return None
