"""Linear attention and short convolutions in native code, forward and backward; see `csrc/linear_attention.c`.

Arithmetic is float32 with one rounding at the end. A task is some of the heads that share keys, computed on one thread
in one order, so results have the same bits whatever the number of threads. What the loops do not take (float64, a decay
for each column, odd widths, scans of single channels) goes to `linear_attention.torch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from nybble.kernels import library
from nybble.kernels.attention.segments import segments_of
from nybble.kernels.linear_attention.chunks import earlier_tokens
from nybble.kernels.linear_attention.torch import Inputs, Settings

__all__ = ["NAME", "attend", "attend_backward", "convolve", "convolve_backward", "takes", "takes_convolution"]

NAME = "native"
_CHUNK = 64  # tokens; CHUNK of csrc/linear_attention.h
_MOST_SLICES = 16  # tasks that share the columns of one key head's gradients: each has its own sums
_WORTH = 1 << 15  # elements of a convolution that a thread should have
_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64


class _Strided(ctypes.Structure):
    _fields_ = (("data", _Pointer), ("token", _Size), ("head", _Size))


class _Chunk(ctypes.Structure):
    _fields_ = (("first", _Size), ("length", _Size), ("before", _Size))


class _LinearAttention(ctypes.Structure):
    _fields_ = (
        *((name, _Strided) for name in ("q", "k", "v", "out", "grad", "dv")),
        *((name, _Pointer) for name in ("g", "beta", "dq", "dk", "dg", "dbeta")),
        ("chunks", ctypes.POINTER(_Chunk)),
        *((name, _Size) for name in ("n_chunks", "heads", "key_heads", "key_width", "width", "slices", "dtype")),
        ("delta", _Size),
        ("normalize", _Size),
        ("scale", ctypes.c_float),
    )


class _Convolution(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("x", "weight", "bias", "out", "grad", "d_weight", "d_bias", "earlier")),
        *((name, _Size) for name in ("tokens", "channels", "taps", "dtype", "silu", "stride", "grad_stride")),
    )


def takes(inputs: Inputs) -> bool:
    """Whether the loops compute linear attention of these."""
    q, k, v, g, _beta = inputs
    fits = g.dim() == 2 and k.shape[2] % 16 == 0 and v.shape[2] % 16 == 0
    return fits and _is_ours(v) and q.dtype == k.dtype == v.dtype


def takes_convolution(x: Tensor) -> bool:
    """Whether the loops filter this."""
    return _is_ours(x) and x.shape[1] % 16 == 0


def _is_ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


def attend(inputs: Inputs, settings: Settings) -> Tensor:
    """`linear_attention.torch.attend`."""
    out = inputs.v.new_empty(inputs.v.shape)
    _run(inputs, settings, out=out)
    return out


def attend_backward(grad: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, ...]:
    """`linear_attention.torch.attend_backward`."""
    q, k, v, g, beta = inputs
    slices = _slices(inputs)
    dq, dk = (torch.zeros(len(x), x.shape[1], slices, x.shape[2], device="cpu") for x in (q, k))
    dv = v.new_empty(v.shape)
    dg, dbeta = (torch.empty(x.shape, device="cpu") for x in (g, beta))
    _run(inputs, settings, grad=grad, dq=dq, dk=dk, dv=dv, dg=dg, dbeta=dbeta)
    return dq.sum(2).to(q.dtype), dk.sum(2).to(k.dtype), dv, dg.to(g.dtype), dbeta.to(beta.dtype)


def _slices(inputs: Inputs) -> int:
    """How many tasks share a key head: as many as give all threads work where there are few key heads."""
    key_heads, heads = inputs.k.shape[1], inputs.v.shape[1]
    return max(1, min(heads // key_heads, _MOST_SLICES // key_heads))


def _run(inputs: Inputs, settings: Settings, **tensors: Tensor) -> None:
    """Forward or, with `grad`, backward, on as many threads as there are tasks."""
    q, k, v, g, beta = inputs
    kept = {"q": q, "k": k, "v": v, "g": g.float(), "beta": beta.float(), **tensors}
    strided = {field[0] for field in _LinearAttention._fields_ if field[1] is _Strided}
    for name in kept:
        if name not in strided or kept[name].stride(-1) != 1:
            kept[name] = kept[name].contiguous()
    chunks = _chunks(tuple(settings.lengths), tuple(settings.parents))
    call = _LinearAttention(
        **{name: _Strided(x.data_ptr(), x.stride(0), x.stride(1)) for name, x in kept.items() if name in strided},
        **{name: x.data_ptr() for name, x in kept.items() if name not in strided},
        chunks=chunks,
        n_chunks=len(chunks),
        heads=v.shape[1],
        key_heads=k.shape[1],
        key_width=k.shape[2],
        width=v.shape[2],
        slices=_slices(inputs),
        dtype=library.DTYPES[v.dtype],
        delta=settings.delta,
        normalize=settings.normalize,
        scale=settings.scale,
    )
    loaded = _library()
    size = loaded.nybble_linear_attention_scratch(ctypes.byref(call), "grad" in tensors)
    tasks = k.shape[1] * call.slices

    def run(first: int, last: int) -> None:
        scratch = torch.empty(size + 16, device="cpu")
        start = (scratch.data_ptr() + 63) // 64 * 64
        loaded.nybble_linear_attention(ctypes.byref(call), start, first, last)

    library.split(run, tasks, tasks)


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _chunks(lengths: tuple[int, ...], parents: tuple[int, ...]) -> ctypes.Array[_Chunk]:
    """The chunks of all segments in order."""
    found: list[_Chunk] = []
    last: list[int] = []  # of each segment its last chunk
    for start, length, _offset, parent in segments_of(lengths, parents):
        before = last[parent] if parent >= 0 else -1
        for first in range(start, start + length, _CHUNK):
            found.append(_Chunk(first, min(_CHUNK, start + length - first), before))
            before = len(found) - 1
        last.append(before)
    return (_Chunk * len(found))(*found)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, lengths: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """`linear_attention.torch.convolve`."""
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    call, _kept = _convolution(x, weight, bias, silu, (lengths, parents), out=out)

    def run(first: int, last: int) -> None:
        _library().nybble_short_convolution(ctypes.byref(call), first, last)

    library.split(run, len(x), x.numel() // _WORTH)
    return out


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    lengths: Sequence[int],
    parents: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_attention.torch.convolve_backward`."""
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    d_weight, d_bias = torch.zeros(weight.shape[1], len(weight), device="cpu"), torch.zeros(len(weight), device="cpu")
    tensors = {"grad": grad, "d_weight": d_weight, "d_bias": d_bias, "out": out}
    call, _kept = _convolution(x, weight, bias, silu, (lengths, parents), **tensors)

    def run(first: int, last: int) -> None:
        scratch = torch.empty(16 * (len(x) + 1), device="cpu")
        start = (scratch.data_ptr() + 63) // 64 * 64
        _library().nybble_short_convolution_backward(ctypes.byref(call), start, first, last)

    library.split(run, x.shape[1] // 16, x.numel() // _WORTH)
    return out, d_weight.t().flip(1), d_bias


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    shape: tuple[Sequence[int], Sequence[int]],  # lengths and parents
    **tensors: Tensor,
) -> tuple[_Convolution, dict[str, Tensor]]:
    """The arguments of the library's function, and the tensors that they point into."""
    lengths, parents = (tuple(part) for part in shape)
    kept = {"x": x, "weight": weight.float().flip(1).t().contiguous(), **tensors}
    kept |= {} if bias is None else {"bias": bias.float().contiguous()}
    for name in ("x", "grad"):
        if name in kept and kept[name].stride(1) != 1:
            kept[name] = kept[name].contiguous()
    kept["earlier"] = earlier_tokens(lengths, parents, weight.shape[1], x.device)
    call = _Convolution(
        **{name: tensor.data_ptr() for name, tensor in kept.items()},
        tokens=len(x),
        channels=x.shape[1],
        taps=weight.shape[1],
        dtype=library.DTYPES[x.dtype],
        silu=silu,
        stride=kept["x"].stride(0),
        grad_stride=kept["grad"].stride(0) if "grad" in kept else 0,
    )
    return call, kept


@cache
def _library() -> ctypes.CDLL:
    loaded = library.load_library()
    loaded.nybble_linear_attention.argtypes = (ctypes.POINTER(_LinearAttention), _Pointer, _Size, _Size)
    loaded.nybble_linear_attention.restype = None
    loaded.nybble_linear_attention_scratch.argtypes = (ctypes.POINTER(_LinearAttention), _Size)
    loaded.nybble_linear_attention_scratch.restype = _Size
    loaded.nybble_short_convolution.argtypes = (ctypes.POINTER(_Convolution), _Size, _Size)
    loaded.nybble_short_convolution.restype = None
    loaded.nybble_short_convolution_backward.argtypes = (ctypes.POINTER(_Convolution), _Pointer, _Size, _Size)
    loaded.nybble_short_convolution_backward.restype = None
    return loaded
