"""Attention with sinks: one learned score of each head takes part in every softmax, and has no value of its own.

With lse = log(sum exp(score)) of a token and head, and s the head's sink,

    lse' = log(exp(lse) + exp(s))    out' = out exp(lse - lse')    ds = -sum over tokens of exp(s - lse') dout' . out'

The shares of the tokens are exp(score - lse'), so the backward pass of plain attention, given out' and lse', makes the
gradients of q, k and v: every backend of the operator `nybble::attend` computes sinks without knowing of them. (Sinks:
Xiao et al. 2023; learned, as here: OpenAI 2025, gpt-oss.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.kernels.attention.torch import Settings

__all__ = ["with_sinks"]


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, settings: Settings) -> Tensor:
    """`attention.attend` with `sinks`, `(heads,)`, which get a gradient too."""
    out: Tensor = _WithSinks.apply(q, k, v, sinks, settings)
    return out


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, settings: Settings) -> Tensor:
        plain, sums = torch.ops.nybble.attend(q, k, v, *settings)
        total = torch.logaddexp(sums, sinks.to(sums.dtype)[:, None])
        out = (plain * (sums - total).exp_().t()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, total)
        ctx.settings = settings
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, out, total = ctx.saved_tensors
        grads = torch.ops.nybble.attend_backward(grad, [q, k, v, out, total], *ctx.settings)
        d_sinks = None
        if ctx.needs_input_grad[3]:
            shares = (sinks.to(total.dtype)[:, None] - total).exp_()
            d_sinks = -(shares * (grad.to(total.dtype) * out).sum(-1).t()).sum(-1).to(sinks.dtype)
        return (*grads, d_sinks, None)
