"""What a backend of attention offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.kernels.attention import torch as reference
from nybble.kernels.attention.torch import Settings

__all__ = ["TORCH", "Attend", "AttentionBackend", "Tensors", "by_operator", "computed_again", "derive_by_autograd"]

Tensors = tuple[Tensor, ...]
Attend = Callable[[Tensor, Tensor, Tensor, Settings], Tensor]  # of q, k and v


class AttentionBackend(NamedTuple):
    """One way to compute attention."""

    NAME: str
    unavailable: Callable[[], str | None]  # why it cannot run here, in words; None if it can be tried
    takes: Callable[[Tensor, Settings], bool]  # whether it computes this; of q
    attend: Attend
    derive: Callable[[Tensors, Tensor, Settings], Tensors]  # result and gradients, of q, k, v and the result's gradient


def by_operator(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """The operator `nybble::attend`, for backends whose backward is written here."""
    out: Tensor = torch.ops.nybble.attend(q, k, v, *settings)[0]
    return out


def derive_by_autograd(attend: Attend) -> Callable[[Tensors, Tensor, Settings], Tensors]:
    """Result and gradients of a backend that autograd differentiates."""

    def derive(inputs: Tensors, grad: Tensor, settings: Settings) -> Tensors:
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        out = attend(q, k, v, settings)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)

    return derive


def computed_again(attend: Attend) -> Attend:
    """`attend`, of which the backward computes the result again from q, k and v.

    For trees: neither the keys that were gathered for each path nor masks outlive a call.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        out: Tensor = _Again.apply(q, k, v, settings, attend)
        return out

    return run


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: Settings, attend: Attend) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.settings = settings
        ctx.attend = attend
        with torch.autocast(q.device.type, enabled=False):
            return attend(q, k, v, settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            _, *grads = derive_by_autograd(ctx.attend)(ctx.saved_tensors, grad, ctx.settings)
        return (*grads, None, None)


def _derive_in_torch(inputs: Tensors, grad: Tensor, settings: Settings) -> Tensors:
    q, k, v = inputs
    out, sums = reference.forward(q, k, v, settings)
    return out, *reference.backward(grad, (q, k, v, out, sums), settings)


# The last backend: it takes all inputs.
TORCH = AttentionBackend("torch", lambda: None, lambda _q, _settings: True, by_operator, _derive_in_torch)
