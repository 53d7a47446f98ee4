"""The loss of the next token without the logits of a batch.

Only rows whose next token is learned go through the output head, some rows at a time. Their logits are in reused
memory, where their own gradient overwrites them, and the gradient of the hidden states is computed from it at once. So
the head costs two products for each learned row and none for the others, and no logits outlive their piece. Sums are
float32 and stay on the device.

Objectives that weigh answers know the coefficient of a token only when all log-probabilities are there. That of the
hidden states is still made in the forward pass: its rows do not mix, so each is multiplied with its token's coefficient
in the backward. That of a trained head sums over tokens, so the backward makes the logits again, piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.kernels.pointwise import ops as pointwise
from nybble.nn.workspace import workspace

_PIECE_BYTES = 1 << 26  # bytes of logits that are computed at a time
_LEAST_ROWS, _MOST_ROWS = 256, 1024  # rows in a product; one of this size is as fast as a larger one


class TokenRows(NamedTuple):
    """Rows of a head or of embeddings that are learned while all others are frozen."""

    numbers: Tensor  # (k,) int64: which rows
    values: Tensor  # (k, hidden): the master weights


@dataclass(frozen=True)
class Head:
    """The output head; a trained one (tied or not) gets its gradient, a frozen one needs none."""

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None  # (vocabulary,), frozen
    softcap: float  # logits become c tanh(logits / c); 0: no cap
    rows: TokenRows | None = None  # take the place of the weight's own; the bias must be None


def next_token_loss(
    hidden: Tensor,  # (n, hidden): the states of the learned rows
    targets: Tensor,  # (n,) int64: their next tokens
    head: Head,
    n_items: Tensor | int,  # the divisor of the sum: the learned tokens of the whole step
) -> Tensor:
    """-sum log p(target) / n_items, a float32 scalar on the device."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        values = head.rows.values if head.rows else None
        total = _SummedLoss.apply(hidden.to(dtype), head.weight, values, targets, head)
    return total / n_items  # type: ignore[no-any-return]


def token_losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """-log p(target) of each learned row, `(n,) float32`; where gradients are on, each may have one of its own."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if torch.is_grad_enabled():
        with torch.autocast(hidden.device.type, enabled=False):
            values = head.rows.values if head.rows else None
            return _TokenLosses.apply(hidden.to(dtype), head.weight, values, targets, head)  # type: ignore[no-any-return]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        pieces = _pieces(hidden.detach().to(dtype), head.weight.detach().to(dtype), targets, head)
        found = [losses.float() for *_, losses in pieces]
    return torch.cat(found) if found else torch.zeros(0, device=hidden.device)


def _pieces(hidden: Tensor, low: Tensor, targets: Tensor, head: Head) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For some rows at a time: which rows, their logits, which their own gradient has overwritten, and their losses."""
    vocabulary = len(low)
    most = min(_MOST_ROWS, max(_LEAST_ROWS, _PIECE_BYTES // (vocabulary * hidden.element_size())))
    n_pieces = math.ceil(len(hidden) / most) or 1
    step = math.ceil(len(hidden) / n_pieces / 16) * 16 or 1  # equal pieces: a small one would read all of the head
    for first in range(0, len(hidden), step):
        chosen = slice(first, first + step)
        piece = hidden[chosen]
        logits = workspace.take((len(piece), vocabulary), hidden, hidden.dtype)
        torch.mm(piece, low.t(), out=logits)
        if head.bias is not None:
            logits += head.bias.to(logits.dtype)
        if head.rows is not None:
            logits[:, head.rows.numbers] = piece @ head.rows.values.detach().to(piece.dtype).t()
        losses = pointwise.cross_entropy_(logits, targets[chosen], head.softcap)
        yield chosen, logits, losses


def _back_through(d_logits: Tensor, weight: Tensor, out: Tensor) -> None:
    """The gradient of the hidden states; oneDNN computes its transpose in 0.85 of the time for up to 1,024 rows."""
    if out.device.type == "cpu" and out.dtype == torch.bfloat16:
        out.copy_(torch.mm(weight.t(), d_logits.t()).t())
    else:
        torch.mm(d_logits, weight, out=out)


def _taken_out(d_logits: Tensor, rows: TokenRows) -> Tensor:
    """The gradient of the logits of `rows`, which is zero in `d_logits` afterwards."""
    taken = d_logits[:, rows.numbers]
    d_logits[:, rows.numbers] = 0
    return taken


def _scaled(d: Tensor, factor: Tensor) -> Tensor:
    """d, multiplied in place with a float32 scalar or `(rows, 1)`; some rows at a time where d has 16 bits.

    A GPU would round the factor to the type of d first: one over the learned tokens is then off by up to 0.4 %, as
    are all gradients. The wide rows lie where the logits lay.
    """
    if d.dtype.itemsize > 2:
        return d.mul_(factor)
    factors = factor.split(_LEAST_ROWS) if factor.dim() else repeat(factor)
    for piece, own in zip(d.split(_LEAST_ROWS), factors, strict=False):
        wide = workspace.take((2 * piece.numel(),), piece, piece.dtype).view(torch.float32).view_as(piece)
        piece.copy_(wide.copy_(piece).mul_(own))
    return d


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, values: Tensor | None, targets: Tensor, head: Head) -> Tensor:
        wants_hidden, wants_weight, wants_values = ctx.needs_input_grad[:3]
        low = weight.detach().to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_values = torch.zeros_like(values) if values is not None and wants_values else None
        for chosen, logits, losses in _pieces(hidden, low, targets, head):
            total += losses.sum()
            d_rows = _taken_out(logits, head.rows) if head.rows else None
            if d_hidden is not None:
                _back_through(logits, low, d_hidden[chosen])
            if d_rows is not None and values is not None and d_hidden is not None:
                d_hidden[chosen] += d_rows @ values.detach().to(hidden.dtype)
            if d_rows is not None and d_values is not None:
                d_values += d_rows.t() @ hidden[chosen]
            if d_weight is not None:
                d_weight += logits.t() @ hidden[chosen]
        ctx.save_for_backward(*(t for t in (d_hidden, d_weight, d_values) if t is not None))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        made = [next(saved) if wanted else None for wanted in ctx.needs_input_grad[:3]]
        return (*(None if d is None else _scaled(d, grad) for d in made), None, None)


class _TokenLosses(torch.autograd.Function):
    """The gradient of each row's loss is kept unscaled, `(n, hidden)`, as the summed loss keeps its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, values: Tensor | None, targets: Tensor, head: Head) -> Tensor:
        low = weight.detach().to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        found = []
        for chosen, logits, losses in _pieces(hidden, low, targets, head):
            found.append(losses)
            if d_hidden is not None:
                d_rows = _taken_out(logits, head.rows) if head.rows else None
                _back_through(logits, low, d_hidden[chosen])
                if d_rows is not None and values is not None:
                    d_hidden[chosen] += d_rows @ values.detach().to(hidden.dtype)
        ctx.head, ctx.trains_head = head, any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(d_hidden, *((hidden, targets) if ctx.trains_head else ()))
        return torch.cat(found) if found else torch.zeros(0, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        d_hidden, *made_again = ctx.saved_tensors
        d_weight = d_values = None
        if ctx.trains_head:
            d_weight, d_values = _head_gradients(ctx, made_again[0], made_again[1], grad)
        return (None if d_hidden is None else _scaled(d_hidden, grad[:, None])), d_weight, d_values, None, None


def _head_gradients(ctx: Any, hidden: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of a trained head, and of its learned rows, from logits made again."""
    head, (_, wants_weight, wants_values) = ctx.head, ctx.needs_input_grad[:3]
    d_weight = torch.zeros_like(head.weight) if wants_weight else None
    d_values = torch.zeros_like(head.rows.values) if wants_values else None
    for chosen, logits, _losses in _pieces(hidden, head.weight.detach().to(hidden.dtype), targets, head):
        weighed = (hidden[chosen] * grad[chosen, None]).to(hidden.dtype)
        d_rows = _taken_out(logits, head.rows) if head.rows else None
        if d_rows is not None and d_values is not None:
            d_values += d_rows.t() @ weighed
        if d_weight is not None:
            d_weight += logits.t() @ weighed
    return d_weight, d_values
