"""Attention in plain torch, forward and backward, a block of queries at a time: any device, window and cap on scores.

It is what the faster backends must equal. Sums are in float32 (float64 for float64), whatever the type of the tensors;
no more than `_HELD` scores exist at once, and the backward makes them again from the logarithms of their sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nybble.kernels.attention.segments import path_places, segments_of

__all__ = ["Settings", "backward", "forward"]

_HELD = 1 << 22  # scores, 16 MiB in float32


class Settings(NamedTuple):
    """Which tokens see each other, and how scores are made; `attention.attend` says what each means."""

    lengths: Sequence[int]
    scale: float
    window: int | None = None
    softcap: float = 0.0
    parents: Sequence[int] = ()  # of the segments of trees; see `attention.segments`

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max((segment.end for segment in segments_of(self.lengths, self.parents)), default=0)


class _Block(NamedTuple):
    rows: slice  # of the flattened batch: the queries
    keys: slice | Tensor  # the tokens that any of them sees, as a slice or as indices
    hidden: Tensor  # (queries, keys) bool: True where the query must not see the key


def forward(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Result of the shape of q, and the logarithm of each softmax's sum, `(heads, T)` float32 (float64 for float64)."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q))
    for block in _blocks(q, settings):
        scores = _scores(q, k, block, settings)
        sums = scores.logsumexp(-1, keepdim=True)
        result = (scores - sums).exp_().flatten(1, 2) @ _by_group(v, block.keys)
        out[block.rows] = _flat(result, q.shape[1]).to(q.dtype)
        lse[:, block.rows] = sums.flatten(0, 1).squeeze(-1)
    return out, lse


def backward(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # q, k, v, and both results of `forward`
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the result."""
    q, k, v, out, lse = saved
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape, dtype=_wide(q)), v.new_zeros(v.shape, dtype=_wide(q))
    groups = (k.shape[1], q.shape[1] // k.shape[1], -1, 1)
    for block in _blocks(q, settings):
        scores = _scores(q, k, block, settings)
        shares = (scores - lse[:, block.rows].reshape(groups)).exp_()
        d_out = _by_group(grad, block.rows, k.shape[1])
        means = (grad[block.rows].to(_wide(q)) * out[block.rows]).sum(-1).t().reshape(groups)
        d_scores = (d_out @ _by_group(v, block.keys).mT).view_as(shares).sub_(means).mul_(shares).mul_(settings.scale)
        if settings.softcap:
            d_scores.mul_(1 - (scores.masked_fill(block.hidden, 0) / settings.softcap).square_())
        dv[block.keys] += (shares.flatten(1, 2).mT @ d_out).transpose(0, 1)
        dk[block.keys] += (d_scores.flatten(1, 2).mT @ _by_group(q, block.rows, k.shape[1])).transpose(0, 1)
        dq[block.rows] = _flat(d_scores.flatten(1, 2) @ _by_group(k, block.keys), q.shape[1]).to(q.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _blocks(q: Tensor, settings: Settings) -> Iterator[_Block]:
    """Blocks of queries of one segment each, all of them in order."""
    segments = segments_of(settings.lengths, settings.parents)
    paths: Sequence[Tensor] = ()
    if settings.parents:
        places = path_places(tuple(settings.lengths), tuple(settings.parents), q.device)
        paths = places.split([segment.end for segment in segments])
    for index, (start, length, offset, _parent) in enumerate(segments):
        end = offset + length
        seen = min(end, settings.window or end)
        step = max(1, min(length, _HELD // (q.shape[1] * end)))
        if seen < end:  # a block sees `seen` keys more than it has rows
            step = max(1, min(seen, _HELD // (q.shape[1] * 2 * seen)))
        origin = start - offset
        for first in range(offset, end, step):  # counted along the path
            last = min(first + step, end)
            oldest = max(0, first - seen + 1)
            rows = torch.arange(first, last, device=q.device).view(-1, 1)
            keys = torch.arange(oldest, last, device=q.device)
            place = paths[index][oldest:last] if offset else slice(origin + oldest, origin + last)
            yield _Block(slice(origin + first, origin + last), place, (keys > rows) | (keys <= rows - seen))


def _scores(q: Tensor, k: Tensor, block: _Block, settings: Settings) -> Tensor:
    """`(kv_heads, heads / kv_heads, queries, keys)`, minus infinity where hidden."""
    kv_heads = k.shape[1]
    scores = (_by_group(q, block.rows, kv_heads) @ _by_group(k, block.keys).mT).mul_(settings.scale)
    if settings.softcap:
        scores = scores.div_(settings.softcap).tanh_().mul_(settings.softcap)
    return scores.view(kv_heads, -1, *block.hidden.shape).masked_fill_(block.hidden, -torch.inf)


def _by_group(x: Tensor, tokens: slice | Tensor, groups: int | None = None) -> Tensor:
    """`(groups, heads / groups * tokens, width)` of some tokens, in the type of the sums; a group for each head of x
    unless told."""
    part = x[tokens].to(_wide(x)).transpose(0, 1)
    return part.reshape(groups or x.shape[1], -1, x.shape[2])


def _flat(x: Tensor, heads: int) -> Tensor:
    """`(groups, heads / groups * tokens, width)` as `(tokens, heads, width)`."""
    return x.reshape(heads, -1, x.shape[2]).transpose(0, 1)
