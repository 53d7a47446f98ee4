"""Products with frozen weights and their adapters, with a backward pass of their own.

    y  = x W^T + bias + s drop(x) A^T B^T
    dx = dy W + drop'(s dy B A)        dA = (s dy B)^T drop(x)        dB = dy^T (s drop(x) A^T)

(LoRA: Hu et al. 2021; on a 4-bit base: Dettmers et al. 2023.) W is decoded into reused memory for each product, and
the adapter is added to the product's own output. Of the activations only x is kept, once for all products that share
it, and only where an adapter needs it. Dropout is a hash of a seed and the element's place, and is computed again in
the backward pass, so no mask is stored. The adapters' gradients have the type of their masters; sums over tokens are
float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.kernels import LowRank, most_rows, multiply, multiply_dense
from nybble.kernels.pointwise import ops as pointwise
from nybble.kernels.pointwise.torch import seed_from
from nybble.nn.workspace import workspace

FEW_ROWS = 4  # rows up to which `multiply_dense` handles 16-bit weights, as in generation


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter with the settings that apply now."""

    a: Tensor  # the master weight, (r, in_features)
    b: Tensor  # (out_features, r)
    scaling: float
    dropout: float  # probability; 0 outside training
    seed: int  # the seed of this adapter's dropout


@dataclass(frozen=True)
class Projection:
    """A linear layer with frozen weights, and the adapter on it."""

    layer: nn.Linear
    dtype: torch.dtype  # the type that the products are computed in
    adapter: Adapter | None = None

    @property
    def has_trained_bias(self) -> bool:
        """Whether the bias gets a gradient; then `project` adds the bias, and `product` does not."""
        return self.layer.bias is not None and self.layer.bias.requires_grad

    def from_row(self, first: int) -> Projection:
        """The projection for a piece of x that begins at row `first`: the dropout is that of the whole."""
        if self.adapter is None or not self.adapter.dropout:
            return self
        seed = seed_from(self.adapter.seed, first * self.layer.in_features)
        return replace(self, adapter=replace(self.adapter, seed=seed))

    def weights(self) -> Iterator[tuple[slice, Tensor]]:
        """W, some rows at a time, usually all: which rows, and their values, valid until the thread's next use."""
        decoded = getattr(self.layer, "decoded", None)
        if decoded:
            yield from decoded(self.dtype)
        else:
            yield slice(None), self.layer.weight.detach()


def projection_of(module: nn.Module) -> Projection | None:
    """What `module` computes, if it is a frozen linear with at most one plain LoRA adapter; else None.

    A layer of Nybble describes itself in a method `projection`. A layer with hooks must be called, not read.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    own = getattr(module, "projection", None)
    if own is not None:
        return cast("Projection | None", own())
    if type(module) is nn.Linear and not module.weight.requires_grad:
        return Projection(module, module.weight.dtype)
    return None


def project(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """`(..., in_features)` through each of `projections`, which share x and a compute type; in the type of x."""
    dtype = projections[0].dtype
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    with without_autocast(x, dtype):
        if torch.is_grad_enabled():
            adapters = [p.adapter for p in projections if p.adapter is not None]
            masters = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]
            results = [
                y + p.layer.bias.to(y.dtype) if p.has_trained_bias else y
                for p, y in zip(projections, _Project.apply(flat, tuple(projections), *masters), strict=True)
            ]
        else:
            results = [product(flat, p, generating=True)[0] for p in projections]
    if x.dim() == 2 and x.dtype == dtype:
        return results
    return [y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype) for y in results]


def without_autocast(x: Tensor, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context without autocast, which would cast again what is already in the compute type.

    Autocast to that same type may stay on: leaving it takes longer than all else that one token needs of a layer.
    """
    kind = x.device.type
    if not torch.is_grad_enabled() and (not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == dtype):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


@dataclass(frozen=True)
class LoraSaved:
    """What the backward pass of an adapter needs besides x."""

    a: Tensor  # A in the compute type
    b: Tensor
    xa: Tensor  # drop(x) A^T, (n, r)


def product(x: Tensor, p: Projection, generating: bool = False) -> tuple[Tensor, LoraSaved | None]:
    """y of x `(n, in_features)`, and what its backward pass needs; `generating`: without gradients."""
    layer, adapter = p.layer, p.adapter
    y = _few_rows(x, p) if generating else None
    if y is None:
        y = _times_transposed(x, p)
    else:
        adapter = None
    bias = layer._parameters["bias"]  # torch's attribute lookup takes too long for a single token
    if bias is not None and (generating or not bias.requires_grad):
        y += bias.to(y.dtype)
    if adapter is None:
        return y, None
    kept = saved_for_backward(x, adapter)
    y.addmm_(kept.xa, kept.b.t(), alpha=adapter.scaling)
    return y, kept


def _times_transposed(x: Tensor, p: Projection) -> Tensor:
    """x W^T."""
    y: Tensor | None = None
    for chosen, weight in p.weights():
        if len(weight) == p.layer.out_features:
            y = x @ weight.t()
        else:
            y = x.new_empty(len(x), p.layer.out_features) if y is None else y
            torch.mm(x, weight.t(), out=y[:, chosen])
        del weight  # frees the memory before the next slice comes
    return cast(Tensor, y)


def _few_rows(x: Tensor, p: Projection) -> Tensor | None:
    """The products of the base and the adapter, where a backend is faster without decoding W; no gradients."""
    layer, adapter, rows = p.layer, p.adapter, x.shape[0]
    packed, low_rank = getattr(layer, "packed", None), None
    if adapter is not None and adapter.dropout:
        return None
    if adapter is not None:
        low_rank = LowRank(adapter.a, adapter.b, adapter.scaling)
    if packed is not None:
        return multiply(x, packed, low_rank) if 0 < rows <= most_rows(x, packed) else None
    weight = layer.weight
    return multiply_dense(x, weight, low_rank) if 0 < rows <= FEW_ROWS and weight.dtype == x.dtype else None


def saved_for_backward(x: Tensor, adapter: Adapter) -> LoraSaved:
    """What the backward pass of `adapter` needs, computed from its input."""
    a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
    spare = -len(a) % _rank_multiple(x.device.type)
    if spare:
        a, b = functional.pad(a, (0, 0, 0, spare)), functional.pad(b, (0, spare))
    return LoraSaved(a, b, _dropped(x, adapter) @ a.t())


def input_gradient(grad: Tensor, p: Projection, into: Tensor | None) -> Tensor:
    """dy W, added to `into` if that is given: the part of dx that comes from the base."""
    for chosen, weight in p.weights():
        part = grad[:, chosen]
        into = part @ weight if into is None else into.addmm_(part, weight)
        del weight
    return cast(Tensor, into)


def adapter_gradients(
    grad: Tensor, x: Tensor, adapter: Adapter, kept: LoraSaved, dx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dA and dB in the type of the masters; the adapter's part of dx is added to `dx` if that is given."""
    dxa = (grad @ kept.b).mul_(adapter.scaling)
    db = wide_product(grad.t(), kept.xa, adapter.b.dtype).mul_(adapter.scaling)
    da = wide_product(dxa.t(), _dropped(x, adapter), adapter.a.dtype)
    if dx is not None and adapter.dropout:
        spread = workspace.take(tuple(dx.shape), dx, dx.dtype)
        torch.mm(dxa, kept.a, out=spread)
        pointwise.direct(dx, spread).dropout_add_(dx, spread, adapter.dropout, adapter.seed)
    elif dx is not None:
        dx.addmm_(dxa, kept.a)
    r = len(adapter.a)
    return da[:r], db[:, :r]


class _Project(torch.autograd.Function):
    """Several products that share their input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: tuple[Projection, ...], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.projections = projections
        made = [product(x, p) for p in projections]
        kept = [k for _, k in made if k is not None]
        ctx.save_for_backward(*([x] if kept else []), *(t for k in kept for t in (k.a, k.b, k.xa)))
        return tuple(y for y, _ in made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        x = next(saved, None)
        dx: Tensor | None = None
        found: list[Tensor | None] = []
        with torch.autocast(_device_of(grads), enabled=False):
            for p, grad in zip(ctx.projections, grads, strict=True):
                kept = LoraSaved(next(saved), next(saved), next(saved)) if p.adapter else None
                if grad is not None and ctx.needs_input_grad[0]:
                    dx = input_gradient(grad, p, dx)
                if p.adapter and kept and x is not None:
                    both = adapter_gradients(grad, x, p.adapter, kept, dx) if grad is not None else (None, None)
                    found += both
        return (dx, None, *found)


def _device_of(grads: Sequence[Tensor | None]) -> str:
    return next((grad.device.type for grad in grads if grad is not None), "cpu")


def _dropped(x: Tensor, adapter: Adapter) -> Tensor:
    """drop(x), in reused memory."""
    if not adapter.dropout:
        return x
    out = workspace.take(tuple(x.shape), x, x.dtype)
    pointwise.direct(x, out).dropout(x, adapter.dropout, adapter.seed, out)
    return out


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, without an intermediate rounding where the device's library can do that."""
    if a.dtype != dtype == torch.float32 and type(a) is Tensor and _widens(a.device.type, a.dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


@cache
def _rank_multiple(kind: str) -> int:
    """The rank to which an adapter is filled up with zeros, which changes no result.

    hipBLASLt reads past narrow products on RDNA4 and ends the process (rocm-libraries PR 8909).
    """
    if kind != "cuda" or torch.version.hip is None:
        return 1
    return 64 if torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName.startswith("gfx12") else 1


@cache
def _widens(kind: str, dtype: torch.dtype) -> bool:
    """Whether torch's products on this kind of device can leave their float32 sums unrounded."""
    one = torch.ones(16, 16, dtype=dtype, device=kind)
    try:
        return bool((torch.mm(one, one, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
