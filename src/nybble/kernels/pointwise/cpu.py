"""The pointwise operators in native code: the loops of `csrc/pointwise_loops.h`, split over threads here.

Arithmetic is float32 with one rounding at the end, as in `pointwise.torch`; sums and functions may differ from it in
their last places, dropout has its bits. Results depend neither on the number of threads nor, but for those last places,
on the instruction set. Every function here takes what `pointwise.ops` hands on: float32, float16 or bfloat16, one type,
contiguous.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from nybble.kernels.library import DTYPES, load_library, split
from nybble.kernels.pointwise.torch import threshold

__all__ = [
    "NAME",
    "cross_entropy_",
    "decode_attention",
    "dropout",
    "dropout_add_",
    "gated",
    "gated_backward_",
    "rms_norm",
    "rms_norm_backward",
    "rope",
]

NAME = "native"
_MOVED = 1 << 17  # elements a thread should have: fewer (about 20 us of them) are not worth waking it
_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64


class _Norm(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer),
        ("weight", _Pointer),
        ("grad", _Pointer),
        ("out", _Pointer),
        ("rstd", _Pointer),
        ("dtype", _Size),
        ("weight_dtype", _Size),
        ("width", _Size),
        ("unit_offset", _Size),
        ("eps", ctypes.c_float),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        ("gate", _Pointer),
        ("up", _Pointer),
        ("grad", _Pointer),
        ("out", _Pointer),
        ("dtype", _Size),
        ("is_gelu", _Size),
    )


class _Dropout(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer),
        ("out", _Pointer),
        ("dtype", _Size),
        ("adds", _Size),
        ("seed", ctypes.c_uint32),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
    )


class _Loss(ctypes.Structure):
    _fields_ = (
        ("logits", _Pointer),
        ("labels", _Pointer),
        ("below", _Pointer),
        ("total", _Pointer),
        ("scratch", _Pointer),
        ("dtype", _Size),
        ("width", _Size),
        ("softcap", ctypes.c_float),
    )


class _Rotation(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer),
        ("cos", _Pointer),
        ("sin", _Pointer),
        ("out", _Pointer),
        ("dtype", _Size),
        ("table_dtype", _Size),
        ("heads", _Size),
        ("width", _Size),
        ("rotated", _Size),
        ("row_stride", _Size),
        ("head_stride", _Size),
        ("sign", ctypes.c_float),
    )


class _DecodeAttention(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("q", "k", "v", "out", "scores")),
        *((name, _Size) for name in ("dtype", "heads", "kv_heads", "tokens", "width")),
        ("k_strides", _Size * 3),
        ("v_strides", _Size * 3),
        ("scale", ctypes.c_float),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """`pointwise.torch.rms_norm`."""
    out, rstd, weight = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32), _readable(weight)
    types = (DTYPES[x.dtype], DTYPES[weight.dtype], x.shape[1])
    pointers = (x.data_ptr(), weight.data_ptr(), None, out.data_ptr(), rstd.data_ptr())
    _run("rms_norm", _Norm(*pointers, *types, unit_offset, eps), x.shape[0], x.numel())
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    """`pointwise.torch.rms_norm_backward`."""
    out, weight, rstd = torch.empty_like(x), _readable(weight), rstd.contiguous()
    types = (DTYPES[x.dtype], DTYPES[weight.dtype], x.shape[1])
    pointers = (x.data_ptr(), weight.data_ptr(), grad.data_ptr(), out.data_ptr(), rstd.data_ptr())
    _run("rms_norm_backward", _Norm(*pointers, *types, unit_offset, 0.0), x.shape[0], x.numel())
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`pointwise.torch.gated`."""
    out = torch.empty_like(gate)
    pointers = (gate.data_ptr(), up.data_ptr(), None, out.data_ptr())
    _run("gated", _Gate(*pointers, DTYPES[gate.dtype], activation != "silu"), gate.numel(), gate.numel())
    return out


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """`pointwise.torch.gated_backward_`."""
    pointers = (gate.data_ptr(), up.data_ptr(), grad.data_ptr(), None)
    _run("gated_backward", _Gate(*pointers, DTYPES[gate.dtype], activation != "silu"), gate.numel(), gate.numel())


def dropout(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    """`pointwise.torch.dropout`."""
    _drop(x, p, seed, out, adds=False)


def dropout_add_(total: Tensor, x: Tensor, p: float, seed: int) -> None:
    """`pointwise.torch.dropout_add_`."""
    _drop(x, p, seed, total, adds=True)


def cross_entropy_(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    """`pointwise.torch.cross_entropy_`.

    Raises:
        IndexError: a label is not the place of a logit.
    """
    n, width = logits.shape
    labels = labels.contiguous()
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < width:
        raise IndexError(f"labels must be in [0, {width}), got {int(labels.min())} to {int(labels.max())}")
    below, total = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    pointers = (logits.data_ptr(), labels.data_ptr(), below.data_ptr(), total.data_ptr())

    def run(first: int, last: int) -> None:
        scratch = below.new_empty(2 if softcap else 1, width)
        loss = _Loss(*pointers, scratch.data_ptr(), DTYPES[logits.dtype], width, softcap)
        _loops().nybble_cross_entropy(ctypes.byref(loss), first, last)

    split(run, n, logits.numel() // _MOVED)
    return total.log_().add_(below)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`pointwise.torch.rope`; x may have strides."""
    out, cos, sin = x.new_empty(x.shape), _readable(cos), _readable(sin.to(cos.dtype))
    pointers = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    shape = (x.shape[1], x.shape[2], cos.shape[-1], x.stride(0), x.stride(1))
    rotation = _Rotation(*pointers, DTYPES[x.dtype], DTYPES[cos.dtype], *shape, -1.0 if inverse else 1.0)
    _run("rope", rotation, x.shape[0], x.numel())
    return out


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`pointwise.torch.decode_attention`; keys and values may have strides, the last of which is 1."""
    (n, heads, width), (kv_heads, tokens) = q.shape, k.shape[1:3]
    out, scores = torch.empty_like(q), q.new_empty(n * heads * tokens, dtype=torch.float32)
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), scores.data_ptr())
    strides = ((_Size * 3)(*k.stride()[:3]), (_Size * 3)(*v.stride()[:3]))
    call = _DecodeAttention(*pointers, DTYPES[q.dtype], heads, kv_heads, tokens, width, *strides, scale)
    _run("decode_attention", call, n * heads, q.numel() * tokens // 4)
    return out


def _drop(x: Tensor, p: float, seed: int, out: Tensor, adds: bool) -> None:
    numbers = (seed & 0xFFFFFFFF, threshold(p), 1 / (1 - p))
    arguments = _Dropout(x.data_ptr(), out.data_ptr(), DTYPES[x.dtype], adds, *numbers)
    _run("dropout", arguments, x.numel(), x.numel())


def _readable(table: Tensor) -> Tensor:
    """A weight or table as the loops read it."""
    return (table if table.dtype in DTYPES else table.float()).contiguous()


def _run(name: str, arguments: ctypes.Structure, n: int, elements: int) -> None:
    """The loop of this name over all of range(n); the tensors it was given are alive in the caller."""
    loop, address = getattr(_loops(), f"nybble_{name}"), ctypes.byref(arguments)
    if elements < 2 * _MOVED:
        loop(address, 0, n)
        return

    def run(first: int, last: int) -> None:
        loop(address, first, last)

    split(run, n, elements // _MOVED)


@cache
def _loops() -> ctypes.CDLL:
    """The library, its row loops declared."""
    library = load_library()
    for name in (
        "rms_norm",
        "rms_norm_backward",
        "gated",
        "gated_backward",
        "dropout",
        "cross_entropy",
        "rope",
        "decode_attention",
    ):
        loop = getattr(library, f"nybble_{name}")
        loop.argtypes, loop.restype = (_Pointer, _Size, _Size), None
    return library
