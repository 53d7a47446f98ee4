"""Attention over rows that follow one another in one sequence; no row sees the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.kernels import attend
from nybble.kernels.pointwise import ops as pointwise


@dataclass(frozen=True)
class Span:
    """Which tokens a token may see, and how scores are computed."""

    scale: float
    window: int | None = None  # number of tokens that a token sees, itself included; None: all tokens before it
    softcap: float = 0.0  # cap on the scores; 0: no cap


def attend_rows(
    q: Tensor,  # (T, heads, width), before rotary positions
    k: Tensor,  # (T, kv_heads, width)
    v: Tensor,
    position: tuple[Tensor, Tensor],  # cos, sin: (T, rotated)
    lengths: Sequence[int],  # tokens of each row or segment of a tree, summing to T
    span: Span,
    parents: Sequence[int] = (),  # the segment that each continues; see `kernels.attention.segments`
) -> Tensor:
    """`(T, heads * width)`."""
    cos, sin = position
    q, k = _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)
    return attend(q, k, v, lengths, span.scale, span.window, span.softcap, parents).reshape(len(q), -1)


def attend_cached(
    q: Tensor,  # (n, heads, width), one token of each row, before rotary positions
    k: Tensor,  # (n, kv_heads, width)
    v: Tensor,
    position: tuple[Tensor, Tensor],  # cos, sin: (n, rotated)
    scale: float,
    remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """`(n, heads * width)`; each token sees all that `remember` returns for its key and value. No gradients.

    `remember` takes keys and values `(n, kv_heads, 1, width)`, and returns them together with the earlier ones,
    `(n, kv_heads, tokens, width)`, as a cache's `update` does.
    """
    turn = pointwise.direct(q, k).rope
    keys, values = remember(turn(k, *position, False).unsqueeze(2), v.unsqueeze(2))
    return pointwise.decode_attention(turn(q, *position, False), keys, values, scale).view(len(q), -1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return pointwise.direct_rope(x, cos, sin)(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        grad = grad.contiguous()
        return pointwise.direct_rope(grad, cos, sin)(grad, cos, sin, True), None, None
