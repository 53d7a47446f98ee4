"""Which code runs the 4-bit operators on a device: the fastest path that gives right results there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from nybble.kernels import attention_paths, cpu, plain, row_paths
from nybble.kernels.choices import LADDERS, Choice, ladder, taken
from nybble.kernels.plain import LowRank
from nybble.quant import PackedWeight, Steps
from nybble.quant.search import nest_scales


class Path(Steps, Protocol):
    """What a path of the 4-bit operators must offer: the loops of the encoder, and these.

    All results are bit-identical but sums.
    """

    NAME: str  # as run.json shows it

    def dequantize(self, weight: PackedWeight, out: Tensor) -> None:
        """Decode `weight` into `out`: contiguous, `weight.shape`, float32, float16 or bfloat16."""

    def most_rows(self, dtype: torch.dtype, weight: PackedWeight) -> int:
        """Rows of `dtype` up to which `multiply` is the fastest way."""

    def multiply(self, x: Tensor, weight: PackedWeight, low_rank: LowRank | None = None) -> Tensor:
        """x (W + s B A)^T in the type of x, for contiguous x of at most 8 rows, or `most_rows`."""

    def multiply_dense(self, x: Tensor, weight: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """The same for contiguous x of at most 8 rows and W of its type, not packed."""


def choice(operator: str, device: torch.device) -> Choice:
    """The path that `operator` takes on `device`."""
    chosen = taken(operator, device)
    if chosen is not None:
        return chosen
    if operator in _TESTS:
        return _first_that_works(operator, device.type)
    if operator in _OTHERS:
        module = _OTHERS[operator]
        path, reason = module.paths_taken(device), module.path_reasons(device)
        return Choice(next(iter(path.values())), next(iter(reason.values()), None))
    return Choice(ladder(operator, device)[0])


def path_for(device: torch.device, operator: str) -> Path:
    """The code of a 4-bit operator on `device`."""
    return path_named(choice(operator, device).path)


def path_named(name: str) -> Path:
    """The code of a path of the 4-bit operators.

    Raises:
        ImportError: Triton is not installed.
    """
    if name == "triton":
        return cast(Path, import_module("nybble.kernels.gpu"))
    return cast(Path, {"native": cpu, "torch": plain}[name])


def unavailable(name: str) -> str | None:
    """Why a path of the 4-bit operators cannot be tried, in words; None if it can."""
    if name == "native":
        return cpu.unavailable()
    return "triton is not installed" if name == "triton" and not find_spec("triton") else None


def paths_taken(device: torch.device) -> dict[str, str]:
    """Operator -> name of the path that it takes on `device`."""
    return {operator: choice(operator, device).path for operator in LADDERS if ladder(operator, device)}


def path_reasons(device: torch.device) -> dict[str, str]:
    """Operator -> why it does not take the fastest path of `device`; empty where it does."""
    chosen = {operator: choice(operator, device) for operator in LADDERS if ladder(operator, device)}
    return {operator: rung.reason for operator, rung in chosen.items() if rung.reason}


@cache
def _first_that_works(operator: str, device_type: str) -> Choice:
    device = torch.device(device_type)
    names = ladder(operator, device)
    if not names:
        return Choice("torch", f"there is no fast path for {device_type}")
    for name in names[:-1]:
        reason = unavailable(name) or self_test(path_named(name), device, operator)
        if reason is None:
            return Choice(name)
    return Choice(names[-1], reason)


def self_test(path: Path, device: torch.device, operator: str) -> str | None:
    """What is wrong with `operator` by `path` on `device`, in words; None if it gives the bits of the plain one.

    Small weights with a short last block are encoded and decoded: a path is only taken where it has been seen to work.
    """
    # In a thread of its own: autocast and other modes of the caller, such as a training step, do not reach there.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_self_test, path, device, operator).result()


def _self_test(path: Path, device: torch.device, operator: str) -> str | None:
    flat = torch.sin(torch.arange(64 * 21 + 37, dtype=torch.float32, device="cpu") ** 1.5).to(device)
    try:
        for quant_type in ("nf4", "fp4"):
            wrong = _TESTS[operator](path, flat, quant_type)
            if wrong:
                return f"self-test of the {path.NAME} path failed: {wrong} differs from the plain path"
    except Exception as error:  # noqa: BLE001 - a compiler or driver may fail in any way; the plain path then runs
        return f"self-test of the {path.NAME} path failed: {type(error).__name__}: {error}"
    return None


def _encoding_differs(path: Path, flat: Tensor, quant_type: str) -> str | None:
    """The first function of the encoder whose result is not the plain path's."""
    scales = plain.search_scales(flat, quant_type, 64, True)
    nested = (flat, quant_type, 64, scales, *nest_scales(scales))
    if not torch.equal(path.search_scales(flat, quant_type, 64, True), scales):
        return "search_scales"
    if not torch.equal(path.nested_codes(*nested), plain.nested_codes(*nested)):
        return "nested_codes"
    nearest = plain.nearest_codes(flat, quant_type, 64, scales)
    return None if torch.equal(path.nearest_codes(flat, quant_type, 64, scales), nearest) else "nearest_codes"


def _decoding_differs(path: Path, flat: Tensor, quant_type: str) -> str | None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = _packed(flat, quant_type, (flat.numel(),), dtype)
        ours, theirs = torch.empty_like(flat, dtype=dtype), torch.empty_like(flat, dtype=dtype)
        path.dequantize(weight, ours)
        plain.dequantize(weight, theirs)
        if not torch.equal(ours, theirs):
            return f"dequantize to {dtype}"
    return None


def _product_differs(path: Path, flat: Tensor, quant_type: str) -> str | None:
    square = _packed(flat[: 64 * 21], quant_type, (21, 64), torch.float32)
    x, dense = flat[:128].view(2, 64), flat[: 64 * 21].view(21, 64)
    adapter = LowRank(flat[-320:].view(5, 64), flat[-210:-105].view(21, 5), 0.5)
    for ours, theirs, name in (
        (path.multiply(x, square), plain.multiply(x, square), "multiply"),
        (path.multiply(x, square, adapter), plain.multiply(x, square, adapter), "multiply with an adapter"),
        (path.multiply_dense(x, dense), plain.multiply_dense(x, dense), "multiply_dense"),
    ):
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
            return name
    return None


def _packed(flat: Tensor, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
    scales = plain.search_scales(flat, quant_type, 64, True)
    nested_absmax, offset = nest_scales(scales)
    codes = plain.nested_codes(flat, quant_type, 64, scales, nested_absmax, offset)
    packed = plain.nearest_codes(flat, quant_type, 64, scales)
    return PackedWeight(packed, codes, shape, 64, quant_type, dtype, nested_absmax, offset)


_TESTS: dict[str, Callable[[Path, Tensor, str], str | None]] = {
    "dequantize_4bit": _decoding_differs,
    "gemv_4bit": _product_differs,
    "quantize_4bit": _encoding_differs,
}
_OTHERS: dict[str, ModuleType] = {"rows": row_paths, "attend": attention_paths}
