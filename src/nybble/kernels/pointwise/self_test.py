"""The self-test of the pointwise operators: whether a backend gives the results of the torch backend on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nybble.kernels.pointwise import torch as reference
from nybble.kernels.pointwise.backend import PointwiseBackend

# What a backend may differ by from the torch backend in the self-test, of 1 + |result|: two places of 16-bit types, 16
# of float32, whose sums of 67 are in another order. Dropout must have the bits.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def self_test(backend: PointwiseBackend, device: torch.device) -> str | None:
    """What is wrong with `backend` on `device`, in words; None if it gives the reference's results (see TOLERANCES)."""
    for dtype, tolerance in TOLERANCES.items():
        pairs = zip(results(backend, dtype, device), results(reference, dtype, device), strict=True)
        for (name, ours), (_, theirs) in pairs:
            allowed = 0.0 if name.startswith("dropout") else tolerance
            wide = theirs.double()
            if not bool(((ours.double() - wide).abs() <= allowed * (1 + wide.abs())).all()):
                return f"{name} in {dtype} differs from the torch backend"
    return None


def results(backend: PointwiseBackend, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Each operator's results on a few rows of an odd width, with the operator's name."""
    drawn = torch.sin(torch.arange(4 * 5 * 67, dtype=torch.float32, device="cpu") ** 1.5)
    x, y, z, weight = (3 * drawn).to(device, dtype).view(4, 5, 67).unbind()
    labels = torch.tensor([0, 66, 5, 31, 32], device=device)
    for unit_offset in (False, True):
        normed, rstd = backend.rms_norm(x, weight[0], 1e-6, unit_offset)
        yield "rms_norm", normed
        yield "rms_norm", rstd
        rstd = reference.rms_norm(x, weight[0], 1e-6, unit_offset)[1]
        yield "rms_norm_backward", backend.rms_norm_backward(y, x, weight[0], rstd, unit_offset)
    for activation in ("silu", "gelu_tanh"):
        yield "gated", backend.gated(x, y, activation)
        changed = (z.clone(), x.clone(), y.clone())
        backend.gated_backward_(*changed, activation)
        yield from (("gated_backward_", result) for result in changed)
    dropped, total = torch.empty_like(x), y.clone()
    backend.dropout(x, 0.3, 7, dropped)
    backend.dropout_add_(total, x, 0.3, -7)
    yield "dropout", dropped
    yield "dropout_add_", total
    for softcap in (0.0, 5.0):
        logits = x.clone()
        yield "cross_entropy_", backend.cross_entropy_(logits, labels, softcap)
        yield "cross_entropy_", logits
    for inverse in (False, True):
        yield "rope", backend.rope(x[:, :66].view(5, 3, 22), y[:, :14].float(), z[:, :14].float(), inverse)
    keys, values = (t[:, :60].reshape(5, 6, 2, 5).transpose(1, 2) for t in (y, z))
    yield "decode_attention", backend.decode_attention(x[:, :20].contiguous().view(5, 4, 5), keys, values, 0.5)
