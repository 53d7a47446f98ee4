"""The self-test of attention: whether result and gradients are near those of float64 on a device."""

from __future__ import annotations

import torch

from nybble.kernels.attention import torch as reference
from nybble.kernels.attention.backend import AttentionBackend
from nybble.kernels.attention.torch import Settings

__all__ = ["TOLERANCES", "self_test"]

# Largest error of any element of the result or a gradient, as a share of the largest magnitude in it.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def self_test(backend: AttentionBackend, device: torch.device) -> str | None:
    """What is wrong with `backend` on `device`, in words: heads of two widths, a window, a cap on scores, a tree."""
    tree = (-1, 0, 1, 0, -1)
    for width, window, softcap, parents in (
        (64, None, 0.0, ()),
        (128, None, 0.0, ()),
        (64, 7, 0.0, ()),
        (64, None, 2.0, ()),
        (64, None, 0.0, tree),
        (64, 7, 0.0, tree),
    ):
        wrong = _wrong(backend, device, width, Settings((5, 1, 33, 33, 70), width**-0.5, window, softcap, parents))
        if wrong:
            return wrong
    return None


def _wrong(backend: AttentionBackend, device: torch.device, width: int, settings: Settings) -> str | None:
    """What is too far from float64, with four heads of q on two of k."""
    n = sum(settings.lengths)
    flat = torch.sin(torch.arange(12 * n * width, dtype=torch.float32, device="cpu") ** 1.5).bfloat16()
    q, grad, k, v = flat.view(n, 12, width).split([4, 4, 2, 2], 1)
    inputs = tuple(x.to(device) for x in (q, k, v))
    if not backend.takes(inputs[0], settings):
        return None
    results = backend.derive(inputs, grad.to(device), settings)
    exact = (q.double(), k.double(), v.double())
    saved = exact + reference.forward(*exact, settings)
    wanted = (saved[3], *reference.backward(grad.double(), saved, settings))
    for name, ours, theirs in zip(("result", "dq", "dk", "dv"), results, wanted, strict=True):
        error = ((ours.cpu().double() - theirs).abs().max() / theirs.abs().max()).item()
        if not error <= TOLERANCES[ours.dtype]:
            return f"{name} is off by {error:.1e} of its largest value, {TOLERANCES[ours.dtype]:.0e} is allowed"
    return None
