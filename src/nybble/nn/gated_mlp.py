"""The gated MLP as one block with a backward of its own.

    h = act(x Wg^T) * (x Wu^T)        y = h Wd^T

The forward pass keeps gate, up and, where an adapter needs it, x for the backward pass, which computes h again. The
gradients of gate and up overwrite gate and up, and h overwrites its own gradient, so that the backward pass needs only
one array more than was kept. While a layer is recomputed, y is not computed, because no operator keeps it (Chen et al.
2016 recompute it, 22 % of a layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from nybble.kernels.pointwise import ops as pointwise
from nybble.nn.lora_projection import (
    LoraSaved,
    Projection,
    adapter_gradients,
    input_gradient,
    product,
    saved_for_backward,
    without_autocast,
)
from nybble.nn.recompute import recomputing


@dataclass(frozen=True)
class GatedMlp:
    """What the block computes; its projections share a compute type."""

    inputs: tuple[Projection, ...]  # gate and up, or one projection with the rows of both (Phi-3)
    down: Projection
    activation: str  # the name of an activation, as `nybble.kernels.pointwise.torch.gated` takes it
    output_is_kept: bool  # whether the layer that follows keeps y (a norm after the block)
    tile_rows: int = 0  # above 0: rows that are computed at a time, of which only x is kept
    takes_x: bool = False  # no other code uses x, so that in tiles its gradient may overwrite it

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections, in the order in which they are used."""
        return (*self.inputs, self.down)

    def __call__(self, x: Tensor) -> Tensor:
        """`(..., hidden)` to `(..., hidden)`, in the type of x."""
        flat = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        adapters = [p.adapter for p in self.projections if p.adapter is not None]
        with without_autocast(x, self.down.dtype):
            if torch.is_grad_enabled():
                whole = _TiledMlp if 0 < self.tile_rows < len(flat) else _GatedMlp
                y = whole.apply(flat, self, *(master for a in adapters for master in (a.a, a.b)))
            else:
                y = _without_gradients(flat, self)
        return cast(Tensor, y.view(x.shape).to(x.dtype))


def _gate_and_up(
    x: Tensor, inputs: tuple[Projection, ...], generating: bool = False
) -> tuple[Tensor, Tensor, list[LoraSaved | None]]:
    made = [product(x, p, generating) for p in inputs]
    if len(made) == 1:
        gate, up = (half.contiguous() for half in made[0][0].chunk(2, dim=-1))
    else:
        gate, up = made[0][0], made[1][0]
    return gate, up, [kept for _, kept in made]


def _gated(gate: Tensor, up: Tensor, block: GatedMlp) -> Tensor:
    return pointwise.direct(gate, up).gated(gate, up, block.activation)


def _without_gradients(x: Tensor, block: GatedMlp) -> Tensor:
    if 0 < block.tile_rows < len(x):
        y = x.new_empty(len(x), block.down.layer.out_features)
        for part, tile in _tiles(x, block):
            y[part] = _without_gradients(x[part], tile)
        return y
    gate, up, _ = _gate_and_up(x, block.inputs, generating=True)
    return product(_gated(gate, up, block), block.down, generating=True)[0]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: GatedMlp, *masters: Tensor) -> Tensor:
        y, gate, up, kept = _forward(x, block, block.output_is_kept or not recomputing())
        ctx.block = block
        ctx.needs_x = any(kept[:-1])
        tensors = (t for k in kept if k is not None for t in (k.a, k.b, k.xa))
        ctx.save_for_backward(gate, up, *([x] if ctx.needs_x else []), *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        block: GatedMlp = ctx.block
        gate, up, *rest = ctx.saved_tensors
        x = rest.pop(0) if ctx.needs_x else None
        saved = iter(rest)
        kept = [LoraSaved(next(saved), next(saved), next(saved)) if p.adapter else None for p in block.projections]
        with torch.autocast(grad.device.type, enabled=False):
            dx, found = _backward(grad, x, block, gate, up, kept, ctx.needs_input_grad[0])
        return (dx, None, *found)


class _TiledMlp(torch.autograd.Function):
    """The block, computed some rows at a time: it keeps only x, and computes gate and up again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: GatedMlp, *masters: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        if recomputing() and not block.output_is_kept:
            return x.new_zeros(()).expand(len(x), block.down.layer.out_features)
        y = x.new_empty(len(x), block.down.layer.out_features)
        for part, tile in _tiles(x, block):
            y[part] = _forward(x[part], tile, True)[0]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        dx = (x if ctx.block.takes_x else torch.empty_like(x)) if ctx.needs_input_grad[0] else None
        sums: list[Tensor] = []
        with torch.autocast(grad.device.type, enabled=False):
            for part, tile in _tiles(x, ctx.block):
                _, gate, up, kept = _forward(x[part], tile, False)
                d_tile, found = _backward(grad[part], x[part], tile, gate, up, kept, dx is not None)
                if dx is not None and d_tile is not None:
                    dx[part] = d_tile
                sums = [a.add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
        return (dx, None, *sums)


def _tiles(x: Tensor, block: GatedMlp) -> Iterator[tuple[slice, GatedMlp]]:
    """Pieces of the rows of x, and the block with its dropout moved to each: the masks are those of the whole."""
    for first in range(0, len(x), block.tile_rows):
        inputs = tuple(p.from_row(first) for p in block.inputs)
        yield slice(first, first + block.tile_rows), replace(block, inputs=inputs, down=block.down.from_row(first))


def _forward(x: Tensor, block: GatedMlp, needs_y: bool) -> tuple[Tensor, Tensor, Tensor, list[LoraSaved | None]]:
    """y (or a stand-in where y is not needed), gate, up, and what the backward pass of each adapter needs."""
    gate, up, kept = _gate_and_up(x, block.inputs)
    if needs_y:
        y, kept_down = product(_gated(gate, up, block), block.down)
    else:
        y = x.new_zeros(()).expand(len(x), block.down.layer.out_features)
        adapter = block.down.adapter
        kept_down = saved_for_backward(_gated(gate, up, block), adapter) if adapter else None
    return y, gate, up, [*kept, kept_down]


def _backward(
    grad: Tensor,
    x: Tensor | None,
    block: GatedMlp,
    gate: Tensor,  # overwritten by its gradient
    up: Tensor,  # overwritten by its gradient
    kept: Sequence[LoraSaved | None],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx, and the adapters' gradients in the order of the projections."""
    h = input_gradient(grad, block.down, None)
    behind: list[Tensor] = []
    if block.down.adapter and kept[-1]:
        # dh must include the adapter's part before h overwrites it, and dA needs that h.
        product_of = _gated(gate, up, block)
        behind += adapter_gradients(grad, product_of, block.down.adapter, kept[-1], h)
        del product_of
    pointwise.direct(h, gate, up).gated_backward_(h, gate, up, block.activation)
    del h
    slopes = (torch.cat([gate, up], dim=-1),) if len(block.inputs) == 1 else (gate, up)
    dx: Tensor | None = None
    before: list[Tensor] = []
    for p, slope, k in zip(block.inputs, slopes, kept, strict=False):
        if needs_dx:
            dx = input_gradient(slope, p, dx)
        if p.adapter and k and x is not None:
            before += adapter_gradients(slope, x, p.adapter, k, dx)
    return dx, [*before, *behind]
