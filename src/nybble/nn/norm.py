"""RMS norm with a frozen weight: keeps its input and one number a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.kernels import rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    """`(..., width)` normalised, in the type of x, as `nybble.kernels.plain_rows` says; none for the weight."""
    flat = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():
        return rows.direct(flat).rms_norm(flat, weight, eps, one_plus)[0].view(x.shape)
    return _RmsNorm.apply(flat, weight, eps, one_plus).view(x.shape)  # type: ignore[no-any-return]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
        y, rstd = rows.rms_norm(x, weight, eps, one_plus)
        ctx.save_for_backward(x, weight, rstd)
        ctx.one_plus = one_plus
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        return rows.rms_norm_backward(grad.contiguous(), x, weight, rstd, ctx.one_plus), None, None, None
