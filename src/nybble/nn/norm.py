"""RMS norm with a frozen weight; it keeps its input and one number per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.kernels.pointwise import ops as pointwise


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """`(..., width)` normalised as `nybble.kernels.pointwise.torch` does, in the type of x; the weight is frozen."""
    flat = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():
        return pointwise.direct(flat).rms_norm(flat, weight, eps, unit_offset)[0].view(x.shape)
    return _RmsNorm.apply(flat, weight, eps, unit_offset).view(x.shape)  # type: ignore[no-any-return]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        y, rstd = pointwise.direct(x).rms_norm(x, weight, eps, unit_offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad = grad.contiguous()
        backward = pointwise.direct(grad, x).rms_norm_backward
        return backward(grad, x, weight, rstd, ctx.unit_offset), None, None, None
