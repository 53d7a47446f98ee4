"""The self-test of linear attention and short convolutions: results and gradients near those of float64 on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.kernels.linear_attention import torch as reference
from nybble.kernels.linear_attention.torch import Inputs, Settings

__all__ = ["TOLERANCES", "self_test"]

# Largest error of any element of the result or a gradient, as a share of the largest magnitude in it.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
_TREE = ((5, 1, 33, 70), (-1, 0, 1, 0))


def self_test(code: Any, device: torch.device) -> str | None:
    """What is wrong with `code` on `device`, in words: with and without the delta rule, rows and a tree."""
    for dtype in TOLERANCES:
        for lengths, parents, delta in ((_TREE[0], (), True), (*_TREE, True), (*_TREE, False)):
            settings = Settings(lengths, parents, 0.25, delta, normalize=delta)
            wrong = _attention_differs(code, device, dtype, settings) or _convolution_differs(
                code, device, dtype, settings
            )
            if wrong:
                return wrong
    return None


def _attention_differs(code: Any, device: torch.device, dtype: torch.dtype, settings: Settings) -> str | None:
    """Four heads on two of keys, of different widths."""
    n = sum(settings.lengths)
    q, k, v, grad = (_waves(n, heads, width, dtype) for heads, width in ((2, 32), (2, 32), (4, 16), (4, 16)))
    inputs = Inputs(
        q, k, v, -_waves(n, 4, 1, torch.float32)[..., 0].abs(), _waves(n, 4, 1, torch.float32)[..., 0].abs()
    )
    there = Inputs(*(x.to(device) for x in inputs))
    if not code.takes(there):
        return None
    found = (code.attend(there, settings), *code.attend_backward(grad.to(device), there, settings))
    exact = Inputs(*(x.double() for x in inputs))
    wanted = (reference.attend(exact, settings), *reference.attend_backward(grad.double(), exact, settings))
    return _differ(("result", "dq", "dk", "dv", "dg", "dbeta"), found, wanted)


def _convolution_differs(code: Any, device: torch.device, dtype: torch.dtype, settings: Settings) -> str | None:
    """Four taps of 32 channels, with SiLU and a bias where there is the delta rule."""
    n = sum(settings.lengths)
    x, grad, weight = (
        _waves(n, 1, 32, dtype)[:, 0],
        _waves(n, 1, 32, dtype)[:, 0],
        _waves(32, 1, 4, torch.float32)[:, 0],
    )
    bias = _waves(32, 1, 1, torch.float32).flatten() if settings.delta else None
    rest = (settings.delta, settings.lengths, settings.parents)
    there = [None if y is None else y.to(device) for y in (x, weight, bias)]
    if not code.takes_convolution(there[0]):
        return None
    found = (code.convolve(*there, *rest), *code.convolve_backward(grad.to(device), *there, *rest))
    exact = (x.double(), weight.double(), None if bias is None else bias.double())
    wanted = (reference.convolve(*exact, *rest), *reference.convolve_backward(grad.double(), *exact, *rest))
    return _differ(("filtered", "dx", "dweight", "dbias"), found, wanted)


def _waves(n: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Numbers that no two places share."""
    size = n * heads * width
    return torch.sin(torch.arange(size, dtype=torch.float32, device="cpu") ** 1.5).to(dtype).view(n, heads, width)


def _differ(names: Sequence[str], found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        error = ((ours.cpu().double() - theirs).abs().max() / theirs.abs().max()).item()
        if not error <= TOLERANCES[ours.dtype]:
            return f"{name} is off by {error:.1e} of its largest value, {TOLERANCES[ours.dtype]:.0e} is allowed"
    return None
