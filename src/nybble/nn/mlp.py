"""The gated MLP as one block with a backward of its own.

    h = act(x Wg^T) * (x Wu^T)        y = h Wd^T

Kept for the backward pass: gate, up and, where an adapter needs it, x. h is computed again; the gradients of gate and
up take the place of gate and up, and h that of its own gradient, so that the backward pass needs one array more than
was kept. While a layer is recomputed, y is not: nothing keeps it (Chen et al. 2016 recompute it, 22 % of a layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nybble.kernels import rows
from nybble.nn.projection import Kept, Projection, adapter_gradients, input_gradient, product
from nybble.nn.recompute import recomputing


@dataclass(frozen=True)
class GatedMlp:
    """What the block computes; the projections share a compute type."""

    inputs: tuple[Projection, ...]  # gate and up, or one with gate and up below each other (Phi-3)
    down: Projection
    activation: str  # of `nybble.kernels.plain_rows.gated`
    output_is_kept: bool  # whether what follows keeps y (a norm behind the block)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of them, in the order of use."""
        return (*self.inputs, self.down)

    def __call__(self, x: Tensor) -> Tensor:
        """`(..., hidden)` to the same, in the type of x."""
        flat = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        adapters = [p.adapter for p in self.projections if p.adapter is not None]
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                y = _GatedMlp.apply(flat, self, *(master for a in adapters for master in (a.a, a.b)))
            else:
                gate, up, _ = _gate_and_up(flat, self.inputs, generating=True)
                y = product(rows.gated(gate, up, self.activation), self.down, generating=True)[0]
        return cast(Tensor, y.view(x.shape).to(x.dtype))


def _gate_and_up(
    x: Tensor, inputs: tuple[Projection, ...], generating: bool = False
) -> tuple[Tensor, Tensor, list[Kept | None]]:
    made = [product(x, p, generating) for p in inputs]
    if len(made) == 1:
        gate, up = (half.contiguous() for half in made[0][0].chunk(2, dim=-1))
    else:
        gate, up = made[0][0], made[1][0]
    return gate, up, [kept for _, kept in made]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: GatedMlp, *masters: Tensor) -> Tensor:
        gate, up, kept = _gate_and_up(x, block.inputs)
        needs_y = block.output_is_kept or not recomputing()
        h = rows.gated(gate, up, block.activation) if needs_y or block.down.adapter else gate
        if needs_y:
            y, kept_down = product(h, block.down)
        else:
            y, kept_down = x.new_zeros(()).expand(len(x), block.down.layer.out_features), _kept_alone(h, block.down)
        ctx.block = block
        needs_x = any(kept)
        tensors = (t for k in (*kept, kept_down) if k is not None for t in (k.a, k.b, k.xa))
        ctx.save_for_backward(gate, up, *([x] if needs_x else []), *tensors)
        ctx.needs_x = needs_x
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        block: GatedMlp = ctx.block
        gate, up, *rest = ctx.saved_tensors
        x = rest.pop(0) if ctx.needs_x else None
        saved = iter(rest)
        kept = [Kept(next(saved), next(saved), next(saved)) if p.adapter else None for p in block.projections]
        with torch.autocast(grad.device.type, enabled=False):
            found = _down_backward(grad, block, kept[-1], gate, up)
            slopes = (torch.cat([gate, up], dim=-1),) if len(block.inputs) == 1 else (gate, up)
            dx: Tensor | None = None
            before: list[Tensor | None] = []
            for p, slope, k in zip(block.inputs, slopes, kept, strict=False):
                if ctx.needs_input_grad[0]:
                    dx = input_gradient(slope, p, dx)
                if p.adapter and k and x is not None:
                    before += adapter_gradients(slope, x, p.adapter, k, dx)
        return (dx, None, *before, *found)


def _down_backward(grad: Tensor, block: GatedMlp, kept: Kept | None, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """Turns gate and up into their gradients, in place; returns those of the down projection's adapter."""
    h = input_gradient(grad, block.down, None)
    adapter = block.down.adapter
    if adapter is None or kept is None:
        rows.gated_backward_(h, gate, up, block.activation)
        return ()
    # The adapter's part of dh must be there before dh turns into h, and dA needs that h.
    product_of = rows.gated(gate, up, block.activation)
    found = adapter_gradients(grad, product_of, adapter, kept, h)
    del product_of
    rows.gated_backward_(h, gate, up, block.activation)
    return found


def _kept_alone(h: Tensor, p: Projection) -> Kept | None:
    """What `product` would keep, without the product."""
    if p.adapter is None:
        return None
    from nybble.nn.projection import dropped

    a, b = p.adapter.a.to(h.dtype), p.adapter.b.to(h.dtype)
    return Kept(a, b, dropped(h, p.adapter) @ a.t())
