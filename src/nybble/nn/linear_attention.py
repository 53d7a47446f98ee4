"""The recurrent parts of a layer over flattened rows, called as the functions of transformers that they stand for.

Tensors have a first dimension of 1: the flattened batch. Settings that tell how transformers' code computes are taken
and left alone. States of a cache are not: with one, transformers' own functions run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from nybble.kernels.linear_attention.ops import linear_attention, selective_scan, short_convolution
from nybble.nn.rows import Rows


def convolve_rows(
    rows: Rows,
    hidden_states: Tensor,  # (1, channels, T)
    weight: Tensor,  # (channels, taps)
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """`causal_conv1d_fn`."""
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"a short convolution is followed by SiLU or nothing, got {activation}")
    out = short_convolution(hidden_states[0].t(), weight, bias, activation is not None, rows.lengths, rows.parents)
    return out.t()[None]


def delta_rule_rows(
    rows: Rows,
    query: Tensor,  # (1, T, key heads, width)
    key: Tensor,
    value: Tensor,  # (1, T, heads, width of v)
    g: Tensor,  # (1, T, heads) or (1, T, heads, width)
    beta: Tensor,  # (1, T, heads)
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """`torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`; no state is returned."""
    scale, normalize = query.shape[-1] ** -0.5, use_qk_l2norm_in_kernel
    q, k, v, g, beta = (x[0] for x in (query, key, value, g, beta))
    out = linear_attention(q, k, v, g, beta, rows.lengths, rows.parents, scale, delta=True, normalize=normalize)
    return out[None], None


def mamba2_rows(
    rows: Rows,
    hidden_states: Tensor,  # (1, T, heads, width)
    dt: Tensor,  # (1, T, heads)
    A: Tensor,  # (heads,), negative
    B: Tensor,  # (1, T, groups, states)
    C: Tensor,  # noqa: N803 - as transformers names it
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """`mamba2_chunk_scan`, in the type of `hidden_states` or of D, whichever is wider."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)[0]
    x = hidden_states[0]
    g = A.to(torch.promote_types(A.dtype, torch.float32)) * dt
    out = linear_attention(C[0], B[0], x, g, dt, rows.lengths, rows.parents)
    return (out if D is None else out + D[:, None] * x)[None]


def mamba_rows(
    rows: Rows,
    hidden_states: Tensor,  # (1, channels, T)
    dt: Tensor,  # (1, channels, T)
    A: Tensor,  # (channels, states), negative
    B: Tensor,  # (1, states, T)
    C: Tensor,  # noqa: N803 - as transformers names it
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> Tensor:
    """`mamba_selective_scan`."""
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = softplus(dt) if delta_softplus else dt
    x, dt, b, c = (part[0].t() for part in (hidden_states, dt, B, C))
    out = selective_scan(x, dt, A, b, c, rows.lengths, rows.parents).t()[None]
    out = out if D is None else out + hidden_states * D[:, None]
    return out if z is None else out * silu(z)
