"""Linear attention, short convolutions and selective scans in plain torch, forward and backward: any device.

It is what the faster backends must equal. Sums are in float32 (float64 for float64), whatever the type of the tensors.
A document begins with an empty state, a segment of a tree with the state at the end of what it continues.

**Linear attention.** Each head has a state S, `(width of k, width of v)`, which decays, is corrected, and is read:

    S_t = diag(exp(g_t)) S_(t-1) + k_t r_t^T         o_t = scale S_t^T q_t
    r_t = beta_t (v_t - (diag(exp(g_t)) S_(t-1))^T k_t)   with the delta rule (Yang et al. 2024, arXiv:2412.06464)
    r_t = beta_t v_t                                      without: Mamba-2's scan (Dao and Gu 2024, arXiv:2405.21060)

g has one number for each head, or one for each of its keys' columns (Kimi Delta Attention, arXiv:2510.26692). Chunks of
tokens are computed by products. With c the sum of g within a chunk up to a token, and S the state before the chunk,

    M(a, b)_ij = sum over d of a_id b_jd exp(c_id - c_jd), i >= j
    (I + beta M(k, k) below the diagonal) R = beta (V - (K exp(c)) S)
    O = (Q exp(c)) S + M(q, k) R           S' = diag(exp(c_last)) S + (K exp(c_last - c))^T R

Exponents are never positive, so nothing overflows. The backward computes a chunk's parts again from its inputs.

**Short convolution.** y_t = act(bias + sum over j of w_j x_(t-j)), for each channel; j counts back on the path.

**Selective scan** (Gu and Dao 2023, arXiv:2312.00752). For each channel, with n numbers as its state:
h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = sum over n of C_t h_t. It is linear attention of one head for each
channel, with k = B, q = C, v = x of width 1, beta = dt and g = dt A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nybble.kernels.linear_attention.chunks import Chunks, chunks_of, earlier_tokens

__all__ = [
    "Inputs",
    "ScanInputs",
    "Settings",
    "attend",
    "attend_backward",
    "convolve",
    "convolve_backward",
    "scan",
    "scan_backward",
    "takes",
    "takes_convolution",
]

_CHUNK = 64  # tokens; with a decay for each column, M takes chunk^2 x width numbers
_CHUNK_OF_COLUMNS = 16
_HELD = 1 << 22  # numbers of the tensors that exist at once for some heads, each 16 MiB in float32
_EPS = 1e-6  # of the normalisation of q and k


class Inputs(NamedTuple):
    """What linear attention is computed from."""

    q: Tensor  # (T, key heads, width)
    k: Tensor  # (T, key heads, width)
    v: Tensor  # (T, heads, width of v); heads is a multiple of key heads, and neighbours share theirs
    g: Tensor  # (T, heads) or (T, heads, width): logarithms of the decay, not positive
    beta: Tensor  # (T, heads)


class Settings(NamedTuple):
    """How linear attention is computed."""

    lengths: Sequence[int]  # tokens of each segment, in order
    parents: Sequence[int]  # see `attention.segments`; empty without trees
    scale: float
    delta: bool  # whether the delta rule corrects the state
    normalize: bool  # q and k are divided by their lengths: x / sqrt(sum of squares + 1e-6)


def takes(_inputs: Inputs) -> bool:
    """Whether linear attention of these is computed here: of any."""
    return True


def takes_convolution(_x: Tensor) -> bool:
    """Whether this is filtered here: anything is."""
    return True


def attend(inputs: Inputs, settings: Settings) -> Tensor:
    """The result, of the shape and type of v."""
    out = inputs.v.new_empty(inputs.v.shape)
    for heads, chunks, block in _blocks(inputs, settings):
        out[:, heads] = chunks_to_tokens(_forward(block, chunks, settings)[0], chunks).to(out.dtype)
    return out


def attend_backward(grad: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g and beta from that of the result."""
    q, k, v, g, beta = inputs
    wide = _wide(v)
    dq, dk = q.new_zeros(q.shape, dtype=wide), k.new_zeros(k.shape, dtype=wide)
    dv, dg, dbeta = v.new_empty(v.shape), g.new_empty(g.shape), beta.new_empty(beta.shape)
    for heads, chunks, block in _blocks(inputs, settings):
        parts = _backward(tokens_to_chunks(grad[:, heads].to(wide), chunks), block, chunks, settings)
        d_q, d_k, d_v, d_g, d_beta = (chunks_to_tokens(part, chunks) for part in parts)
        shared = torch.arange(heads.start, heads.stop, device=q.device) // (v.shape[1] // k.shape[1])
        dq.index_add_(1, shared, d_q)
        dk.index_add_(1, shared, d_k)
        dv[:, heads] = d_v.to(v.dtype)
        dg[:, heads] = d_g.view_as(dg[:, heads]).to(g.dtype)
        dbeta[:, heads] = d_beta.squeeze(-1).to(beta.dtype)
    dq.mul_(settings.scale)
    if settings.normalize:
        dq, dk = _normalize_backward(dq, q), _normalize_backward(dk, k)
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg, dbeta


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(inputs: Inputs, settings: Settings) -> Iterator[tuple[slice, Chunks, Inputs]]:
    """Some heads at a time, in chunks: q, k, v `(chunks, heads, size, width)`, g and beta with a last dimension.

    q is scaled, and both q and k are normalised if they are to be.
    """
    q, k, v, g, beta = inputs
    size = _CHUNK if g.dim() == 2 else _CHUNK_OF_COLUMNS
    chunks = chunks_of(tuple(settings.lengths), tuple(settings.parents), size, v.device)
    per_head = chunks.n * max(size * size * (1 if g.dim() == 2 else k.shape[2]), k.shape[2] * v.shape[2])
    step = max(1, _HELD // max(1, per_head))
    for first in range(0, v.shape[1], step):
        heads = slice(first, min(first + step, v.shape[1]))
        shared = torch.arange(heads.start, heads.stop, device=v.device) // (v.shape[1] // k.shape[1])
        q_part, k_part = (x.index_select(1, shared).to(_wide(v)) for x in (q, k))
        if settings.normalize:
            q_part, k_part = q_part * _rlength(q_part), k_part * _rlength(k_part)
        g_part = g[:, heads].unsqueeze(-1) if g.dim() == 2 else g[:, heads]
        rest = (v[:, heads], g_part, beta[:, heads].unsqueeze(-1))
        parts = (q_part.mul_(settings.scale) if settings.normalize else q_part * settings.scale, k_part, *rest)
        yield heads, chunks, Inputs(*(tokens_to_chunks(x.to(_wide(v)), chunks) for x in parts))


def tokens_to_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """`(T, heads, width)` as `(chunks, heads, size, width)`, zero where a chunk has no token."""
    padded = pad(x, (0, 0, 0, 0, 0, 1))
    return padded[chunks.token].view(chunks.n, chunks.size, *x.shape[1:]).transpose(1, 2).contiguous()


def chunks_to_tokens(x: Tensor, chunks: Chunks) -> Tensor:
    """`(chunks, heads, size, width)` as `(T, heads, width)`."""
    return x.transpose(1, 2).reshape(chunks.n * chunks.size, x.shape[1], -1)[chunks.place]


class _Parts(NamedTuple):
    """What chunks need of their inputs, whatever the state before them."""

    q_in: Tensor  # Q exp(c), which reads the state before the chunk
    k_in: Tensor  # K exp(c)
    k_out: Tensor  # K exp(c_last - c), which writes the state after it
    decay: Tensor  # (n, heads, width or 1, 1): exp(c_last)
    reads: Tensor  # M(q, k)
    corrects: Tensor | None  # M(k, k) below the diagonal
    solve: Tensor | None  # the inverse of I + beta M(k, k)
    gaps: Tensor  # exp(c_i - c_j), (n, heads, size, size), or with columns (.., size, size, width)


def _parts(block: Inputs, delta: bool) -> _Parts:
    q, k, _v, g, beta = block
    c = g.cumsum(-2)
    last = c[..., -1:, :]
    from_start, to_end = c.exp(), (last - c).exp()
    later = torch.ones(c.shape[-2], c.shape[-2], dtype=torch.bool, device=c.device).triu_(1)
    if c.shape[-1] == 1:
        gaps = (c - c.mT).masked_fill_(later, -torch.inf).exp_()
    else:
        gaps = (c.unsqueeze(-2) - c.unsqueeze(-3)).masked_fill_(later.unsqueeze(-1), -torch.inf).exp_()
    corrects = solve = None
    if delta:
        corrects = _pairs(k, k, gaps).tril_(-1)
        eye = torch.eye(c.shape[-2], dtype=c.dtype, device=c.device).expand_as(corrects)
        solve = torch.linalg.solve_triangular(beta * corrects, eye, upper=False, unitriangular=True)
    return _Parts(q * from_start, k * from_start, k * to_end, last.exp().mT, _pairs(q, k, gaps), corrects, solve, gaps)


def _pairs(a: Tensor, b: Tensor, gaps: Tensor) -> Tensor:
    """M(a, b)."""
    if gaps.dim() == a.dim():
        return (a @ b.mT).mul_(gaps)
    return torch.einsum("...id,...jd,...ijd->...ij", a, b, gaps)


def _pairs_backward(d: Tensor, a: Tensor, b: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and b from that of M(a, b)."""
    if gaps.dim() == a.dim():
        d = d * gaps
        return d @ b, d.mT @ a
    weighted = d.unsqueeze(-1) * gaps
    return (weighted * b.unsqueeze(-3)).sum(-2), (weighted * a.unsqueeze(-2)).sum(-3)


def _forward(block: Inputs, chunks: Chunks, settings: Settings) -> tuple[Tensor, Tensor, Tensor, _Parts]:
    """The result, R, and the state before each chunk, `(chunks, heads, width of k, width of v)`."""
    parts = _parts(block, settings.delta)
    results = block.beta * block.v
    states = block.v.new_zeros(*block.v.shape[:2], block.k.shape[-1], block.v.shape[-1])
    after: Tensor | None = None
    for now, before in chunks.levels:
        if after is not None and before is not None:
            states[now] = after[before]
        state = states[now]
        if parts.solve is not None:
            results[now] = parts.solve[now] @ (results[now] - block.beta[now] * (parts.k_in[now] @ state))
        after = parts.decay[now] * state + parts.k_out[now].mT @ results[now]
    return parts.q_in @ states + parts.reads @ results, results, states, parts


def _backward(grad: Tensor, block: Inputs, chunks: Chunks, settings: Settings) -> tuple[Tensor, ...]:
    """Gradients of a block: of q and k as they are in it, of v, g and beta."""
    q, k, v, g, beta = block
    _out, results, states, parts = _forward(block, chunks, settings)
    d_results = parts.reads.mT @ grad
    d_states = parts.q_in.mT @ grad  # of the state before each chunk
    d_after = torch.zeros_like(states)  # of the state after each chunk
    for number in reversed(range(len(chunks.levels))):
        now, before = chunks.levels[number]
        d_results[now] += parts.k_out[now] @ d_after[now]
        if parts.solve is not None:
            d_results[now] = parts.solve[now].mT @ d_results[now]
            d_states[now] -= parts.k_in[now].mT @ (beta[now] * d_results[now])
        d_states[now] += parts.decay[now] * d_after[now]
        if before is not None:
            d_after[chunks.levels[number - 1].chunks].index_add_(0, before, d_states[now])
    c = g.cumsum(-2)
    last = c[..., -1:, :]
    d_q, d_k_late = _pairs_backward((grad @ results.mT).tril_(), q, k, parts.gaps)
    d_q += (grad @ states.mT).mul_(c.exp())
    d_k_out = (results @ d_after.mT).mul_((last - c).exp())
    d_k_late += d_k_out
    d_k_early = torch.zeros_like(d_k_late)
    d_v = beta * d_results
    d_beta = (d_results * v).sum(-1, keepdim=True)
    if parts.corrects is not None:
        d_beta -= (d_results * (parts.k_in @ states)).sum(-1, keepdim=True)
        d_pairs = -(d_results @ results.mT).tril_(-1)
        d_beta += (d_pairs * parts.corrects).sum(-1, keepdim=True)
        d_k_early, d_later = _pairs_backward(beta * d_pairs, k, k, parts.gaps)
        d_k_late += d_later
        d_k_early -= (d_v @ states.mT).mul_(c.exp())
    # Rows multiply by exp(c), columns by exp(-c).
    d_c = q * d_q + k * (d_k_early - d_k_late)
    d_last = (k * d_k_out).sum(-2, keepdim=True) + (d_after * states).sum(-1).unsqueeze(-2) * parts.decay.mT
    if c.shape[-1] == 1:
        d_c, d_last = d_c.sum(-1, keepdim=True), d_last.sum(-1, keepdim=True)
    d_c[..., -1:, :] += d_last
    d_g = d_c.flip(-2).cumsum(-2).flip(-2)
    return d_q, d_k_early + d_k_late, d_v, d_g, d_beta


def _rlength(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).add_(_EPS).rsqrt_()


def _normalize_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of `x * _rlength(x)`."""
    x = x.to(grad.dtype)
    rlength = _rlength(x)
    unit = x * rlength
    return rlength * (grad - unit * (grad * unit).sum(-1, keepdim=True))


# Selective scan


class ScanInputs(NamedTuple):
    """What a selective scan is computed from."""

    x: Tensor  # (T, channels)
    dt: Tensor  # (T, channels), not negative
    a: Tensor  # (channels, n), not positive
    b: Tensor  # (T, n)
    c: Tensor  # (T, n)


def scan(inputs: ScanInputs, lengths: Sequence[int], parents: Sequence[int]) -> Tensor:
    """The result, of the shape and type of x."""
    out = inputs.x.new_empty(inputs.x.shape)
    settings = Settings(lengths, parents, 1.0, delta=False, normalize=False)
    for channels, heads in _channels(inputs):
        out[:, channels] = attend(heads, settings).squeeze(-1)
    return out


def scan_backward(
    grad: Tensor, inputs: ScanInputs, lengths: Sequence[int], parents: Sequence[int]
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, a, b and c from that of the result; those of a, b and c in the type of the sums."""
    x, dt, a, b, c = inputs
    dx, d_dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    da, db, dc = (y.new_zeros(y.shape, dtype=_wide(x)) for y in (a, b, c))
    settings = Settings(lengths, parents, 1.0, delta=False, normalize=False)
    for channels, heads in _channels(inputs):
        wide = grad[:, channels].unsqueeze(-1).to(_wide(x))
        d_q, d_k, d_v, d_g, d_beta = attend_backward(wide, heads, settings)
        dx[:, channels] = d_v.squeeze(-1).to(x.dtype)
        d_dt[:, channels] = ((d_g * a[channels]).sum(-1) + d_beta).to(dt.dtype)
        da[channels] = (d_g * dt[:, channels].unsqueeze(-1)).sum(0)
        db += d_k.squeeze(1)
        dc += d_q.squeeze(1)
    return dx, d_dt, da, db, dc


def _channels(inputs: ScanInputs) -> Iterator[tuple[slice, Inputs]]:
    """Some channels at a time, as heads of linear attention."""
    x, dt, a, b, c = (y.to(_wide(inputs.x)) for y in inputs)
    step = max(1, _HELD // max(1, len(x) * a.shape[1]))
    for first in range(0, x.shape[1], step):
        part = slice(first, first + step)
        g = dt[:, part].unsqueeze(-1) * a[part]
        yield part, Inputs(c.unsqueeze(1), b.unsqueeze(1), x[:, part].unsqueeze(-1), g, dt[:, part])


# Short convolution


def convolve(
    x: Tensor,  # (T, channels)
    weight: Tensor,  # (channels, taps), the last of which meets the token itself
    bias: Tensor | None,  # (channels,)
    silu: bool,  # whether SiLU follows
    lengths: Sequence[int],
    parents: Sequence[int],
) -> Tensor:
    """`(T, channels)` in the type of x."""
    sums = _filtered(x, weight, bias, lengths, parents)
    return (torch.nn.functional.silu(sums) if silu else sums).to(x.dtype)


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    lengths: Sequence[int],
    parents: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in the type of the sums."""
    d_sums = grad.to(_wide(x))
    if silu:
        sums = _filtered(x, weight, bias, lengths, parents)
        gate = sums.sigmoid()
        d_sums = d_sums * gate * (1 + sums * (1 - gate))
    earlier = earlier_tokens(tuple(lengths), tuple(parents), weight.shape[1], x.device)
    padded = pad(x, (0, 0, 0, 1)).to(d_sums.dtype)
    d_x = torch.zeros_like(padded)
    d_weight = weight.new_empty(weight.shape, dtype=d_sums.dtype)
    for steps, tokens in enumerate(earlier):
        tap = -1 - steps
        d_x.index_add_(0, tokens, d_sums * weight[:, tap].to(d_sums.dtype))
        d_weight[:, tap] = (d_sums * padded[tokens]).sum(0)
    return d_x[:-1].to(x.dtype), d_weight, d_sums.sum(0)


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int], parents: Sequence[int]) -> Tensor:
    earlier = earlier_tokens(tuple(lengths), tuple(parents), weight.shape[1], x.device)
    padded = pad(x, (0, 0, 0, 1)).to(_wide(x))
    sums = padded.new_zeros(x.shape) if bias is None else bias.to(padded.dtype).expand(x.shape).clone()
    for steps, tokens in enumerate(earlier):
        sums.addcmul_(padded[tokens], weight[:, -1 - steps].to(padded.dtype))
    return sums
