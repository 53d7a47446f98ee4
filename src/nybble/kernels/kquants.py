"""The blocks of GGUF in native code, `csrc/kquants.c`: the bits of `nybble.quant.kquants.fit_blocks`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels import library
from nybble.quant import kquants as reference
from nybble.quant.kquants import FORMATS, Fitted

_WORTH = 1 << 16  # weights that a thread should have
_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64


class _KQuant(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("x", "w", "factors", "codes", "scales", "mins", "d", "e")),
        *((name, _Size) for name in ("row_blocks", "groups", "vectors", "n_factors", "affine", "has_scales")),
        *((name, ctypes.c_float) for name in ("least_code", "largest_code", "least_scale", "largest_scale")),
    )


def fit_blocks(x: Tensor, w: Tensor, name: str) -> Fitted:
    """As the reference, by the native library where it is there and has the format (not IQ4_NL)."""
    if name == "IQ4_NL" or library.unavailable() is not None:
        return reference.fit_blocks(x, w, name)
    form = FORMATS[name]
    n = len(x)
    x, w, factors = x.contiguous(), w.contiguous(), reference.factors(form)
    fitted = Fitted(
        torch.empty(x.shape, dtype=torch.uint8),
        torch.empty(n, form.groups, dtype=torch.int8),
        torch.empty(n, form.groups, dtype=torch.int8),
        torch.empty(n),
        torch.empty(n),
    )
    addresses = [one.data_ptr() for one in (x, w, factors, *vars(fitted).values())]
    sizes = [len(w), form.groups, form.group // reference.LANES, len(factors), form.is_affine, form.scales is not None]
    task = _KQuant(*addresses, *sizes, *form.codes, *(form.scales or (0, 0)))
    loaded = library.load_library()

    def run(first: int, last: int) -> None:
        loaded.nybble_kquants(ctypes.byref(task), first, last)

    library.split(run, n, x.numel() // _WORTH)
    return fitted
