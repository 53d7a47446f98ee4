"""Attention in native code, forward and backward: bfloat16 on processors with AVX512-BF16; see `csrc/attention.c`.

Each head of a document is a task; the threads take tasks one by one, the longest documents first. The sums of a head
are computed on one thread in one order, so that results have the same bits whatever the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from nybble.kernels import library
from nybble.kernels.attention.backend import AttentionBackend, Tensors, by_operator
from nybble.kernels.attention.segments import Segment, segments_of
from nybble.kernels.attention.torch import Settings

__all__ = ["NATIVE", "backward", "forward", "takes", "unavailable"]

_WORTH = 1 << 22  # multiplications that a thread should have (20 us)
_ALL = 2**62  # a window without end
_Size = ctypes.c_int64


class _StridedHeads(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token", _Size), ("head", _Size))


class _Segment(ctypes.Structure):
    _fields_ = tuple((name, _Size) for name in Segment._fields)


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _StridedHeads) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        ("lse", ctypes.c_void_p),
        ("segments", ctypes.POINTER(_Segment)),
        ("firsts", ctypes.POINTER(_Size)),
        *((name, _Size) for name in ("documents", "tokens", "heads", "kv_heads", "longest", "width", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("next", _Size),
    )


@cache
def unavailable() -> str | None:
    """Why this backend cannot be used, in words; None if it can be tried."""
    missing = library.unavailable()
    if missing:
        return missing
    return None if _library().nybble_attend_available() else "the processor has no AVX512-BF16"


def takes(q: Tensor, settings: Settings) -> bool:
    """Whether the loops compute this."""
    fits = q.dtype == torch.bfloat16 and q.shape[2] % 16 == 0 and q.shape[2] <= library.MAX_WIDTH
    return fits and q.device.type == "cpu" and q.numel() > 0 and settings.scale > 0


def forward(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """`attention.torch.forward`."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    _run("nybble_attend", tensors, settings, q.shape[1])
    return out, lse


def backward(
    grad: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention.torch.backward`."""
    q, k, v, out, lse = saved
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "grad": grad}
    tensors |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    _run("nybble_attend_backward", tensors, settings, k.shape[1])
    return grads


def _run(name: str, tensors: dict[str, Tensor], settings: Settings, heads: int) -> None:
    """Call the library's function on as many threads as there is work for, `heads` tasks to a document."""
    kept = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in tensors.items()}
    q = kept["q"]
    documents = _documents(settings)
    segments = [segment for document in documents for segment in document]
    longest, n = settings.longest, len(documents)
    call = _Attention(
        **{name: _StridedHeads(x.data_ptr(), x.stride(0), x.stride(1)) for name, x in kept.items() if name != "lse"},
        lse=kept["lse"].data_ptr(),
        segments=(_Segment * len(segments))(*(_Segment(*segment) for segment in segments)),
        firsts=(_Size * (n + 1))(*accumulate(map(len, documents), initial=0)),
        documents=n,
        tokens=q.shape[0],
        heads=q.shape[1],
        kv_heads=kept["k"].shape[1],
        longest=longest,
        width=q.shape[2],
        window=settings.window or _ALL,
        scale=settings.scale,
        softcap=settings.softcap,
    )
    work = q.numel() * min(longest, settings.window or longest)
    threads = max(1, min(torch.get_num_threads(), n * heads, work // _WORTH))
    function: Callable[..., None] = getattr(_library(), name)
    size = (_library().nybble_attend_scratch(q.shape[2], longest) + 63) // 64 * 64
    scratch = torch.empty(threads * size + 63, dtype=torch.uint8, device="cpu")
    first = (scratch.data_ptr() + 63) // 64 * 64

    def run(thread: int, _: int) -> None:
        function(ctypes.byref(call), first + thread * size)

    library.split(run, threads, threads)


def _documents(settings: Settings) -> list[list[Segment]]:
    """The segments of each document, the document of the most tokens first; parents as indices into all of these."""
    found: list[list[Segment]] = []
    for index, segment in enumerate(segments_of(settings.lengths, settings.parents)):
        if segment.parent < 0:
            found.append([segment])
            first = index
        else:
            found[-1].append(segment._replace(parent=segment.parent - first))
    found.sort(key=lambda document: (sum(segment.length for segment in document), document[0].start), reverse=True)
    firsts = accumulate(map(len, found), initial=0)
    return [
        [s if s.parent < 0 else s._replace(parent=first + s.parent) for s in document]
        for first, document in zip(firsts, found, strict=False)
    ]


@cache
def _library() -> ctypes.CDLL:
    loaded = library.load_library()
    for name in ("nybble_attend", "nybble_attend_backward"):
        getattr(loaded, name).argtypes = (ctypes.POINTER(_Attention), ctypes.c_void_p)
        getattr(loaded, name).restype = None
    loaded.nybble_attend_scratch.argtypes = (_Size, _Size)
    loaded.nybble_attend_scratch.restype = _Size
    return loaded


def _derive(inputs: Tensors, grad: Tensor, settings: Settings) -> Tensors:
    q, k, v = inputs
    out, lse = forward(q, k, v, settings)
    return out, *backward(grad, (q, k, v, out, lse), settings)


NATIVE = AttentionBackend("native", unavailable, takes, by_operator, _derive)
