"""Attention over documents that follow one another in a flattened batch; there is never a mask of T x T.

`attend` takes the first backend of the device that passed its self-test and takes these arguments (see
`nybble.kernels.dispatch`). The operators `nybble::attend` and `nybble::attend_backward` are the backends whose backward
is written here: native code on CPUs with AVX512-BF16, plain torch everywhere. Their fakes let the same call run on
tensors without data, whatever the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nybble.kernels.attention import cpu
from nybble.kernels.attention import torch as reference
from nybble.kernels.attention.segments import check_parents
from nybble.kernels.attention.sinks import with_sinks
from nybble.kernels.attention.torch import Settings
from nybble.kernels.dispatch import dispatcher

__all__ = ["attend", "implementation"]


def attend(
    q: Tensor,  # (T, heads, width)
    k: Tensor,  # (T, kv_heads, width), heads a multiple of kv_heads
    v: Tensor,  # (T, kv_heads, width)
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    parents: Sequence[int] = (),
    sinks: Tensor | None = None,  # (heads,)
) -> Tensor:
    """Causal attention within each document, `(T, heads, width)` contiguous; can be differentiated once.

    Args:
        q, k, v: of one type and device; any strides, the last of which is 1 for the fast backends.
        lengths: tokens of each document, in order.
        scale: of the scores.
        window: how many tokens a token sees, itself among them; all before it by default.
        softcap: c > 0 makes each score c tanh(score / c), as in Gemma 2.
        parents: makes trees of the documents (see `attention.segments`): for each, the index of the one that it
            continues and whose tokens it therefore sees, or -1; by default each stands alone.
        sinks: a score of each head that takes part in every softmax and adds nothing to the result (gpt-oss).

    Raises:
        ValueError: shapes, types or lengths that do not fit each other.
    """
    _check(q, k, v, lengths, window, parents)
    parents = parents if any(parent >= 0 for parent in parents) else ()
    settings = Settings([length for length in lengths if length], scale, window, softcap, parents)
    if window is not None and window >= settings.longest:
        settings = settings._replace(window=None)
    if sinks is not None:
        return with_sinks(q, k, v, sinks, settings)
    if not isinstance(q, FakeTensor) and q.numel():
        backend = dispatcher.attention(q.device, lambda backend: backend.takes(q, settings))
        if backend is not None:
            return backend.attend(q, k, v, settings)
    out: Tensor = torch.ops.nybble.attend(q, k, v, *settings)[0]
    return out


def implementation(q: Tensor, settings: Settings) -> ModuleType:
    """What runs the operator `nybble::attend` and its backward: the native code, or plain torch."""
    if q.device.type == "cpu" and cpu.takes(q, settings):
        # Of this backend alone: the self-tests of others run this operator.
        (native,) = dispatcher.named("attend", cpu.NATIVE.NAME, q.device)
        if dispatcher.allows("attend", native, q.device):
            return cpu
    return reference


@torch.library.custom_op("nybble::attend", mutates_args=())
def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
    softcap: float,
    parents: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each softmax's sum `(heads, T)`."""
    settings = Settings(lengths, scale, window, softcap, parents or ())
    _check(q, k, v, lengths, window, settings.parents)
    result: tuple[Tensor, Tensor] = implementation(q, settings).forward(q, k, v, settings)
    return result


@torch.library.custom_op("nybble::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    saved: Sequence[Tensor],  # q, k, v, and both results of `nybble::attend`
    lengths: Sequence[int],
    scale: float,
    window: int | None,
    softcap: float,
    parents: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    settings = Settings(lengths, scale, window, softcap, parents or ())
    result: tuple[Tensor, Tensor, Tensor] = implementation(grad, settings).backward(grad, tuple(saved), settings)
    return result


@attend_op.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    sums = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), sums


@attend_backward.register_fake
def _(grad: Tensor, saved: Sequence[Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = saved[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.settings = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = torch.ops.nybble.attend_backward(grad, list(ctx.saved_tensors), *ctx.settings)
    return (*grads, None, None, None, None, None)


attend_op.register_autograd(_backward, setup_context=_save)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, parents: Sequence[int]) -> None:
    if q.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"q must be (T, heads, width), k and v (T, a divisor of heads, width), got {shapes}")
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must be of one type and device, got {q.dtype}, {k.dtype} and {v.dtype}")
    if sum(lengths) != q.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"lengths must sum to the {q.shape[0]} tokens, got {sum(lengths)} in {len(lengths)} documents")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if parents:
        check_parents(lengths, parents)
