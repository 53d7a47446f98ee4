"""What happens between the products of a training step, row by row, in plain torch: the definition of correct.

Inner arithmetic is float32 with one rounding at the end. Activations are `(n, width)`, contiguous, float32, float16 or
bfloat16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "NAME",
    "cross_entropy_",
    "decode_attention",
    "dropout",
    "dropout_add_",
    "gated",
    "gated_backward_",
    "rms_norm",
    "rms_norm_backward",
    "rope",
]

NAME = "torch"
_TANH_SCALE = math.sqrt(2 / math.pi)  # of GELU's tanh form (Hendrycks and Gimpel 2016)
_TANH_CUBE = 0.044715
_STRIDE = 0x9E3779B1  # 2^32 over the golden ratio: neighbouring places lie far apart


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 as it is, so that gradients can be held against finite differences."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """x / rms(x) times weight, and 1 / rms(x) `(n,) float32` (Zhang and Sennrich 2019).

    With `unit_offset` the weight is 1 + weight and nothing is rounded before the end (Gemma); without, the normalised
    row is rounded to the type of x first (Llama).
    """
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = wide * rstd[:, None]
    if unit_offset:
        return (normed * (1 + _wide(weight))).to(x.dtype), rstd
    return (normed.to(x.dtype) * weight).to(x.dtype), rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    """dL/dx; the weight is frozen. With n = x rstd and g = dL/dy w: rstd (g - n mean(g n))."""
    scaled = _wide(grad) * (1 + _wide(weight) if unit_offset else _wide(weight))
    normed = _wide(x) * rstd[:, None]
    return ((scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, None]).to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up; `silu` or `gelu_tanh`."""
    wide = _wide(gate)
    active = functional.silu(wide) if activation == "silu" else functional.gelu(wide, approximate="tanh")
    return (active * _wide(up)).to(gate.dtype)


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """In place: grad (of the product) becomes the product, gate and up become their gradients."""
    g, u, d = _wide(gate), _wide(up), _wide(grad)
    if activation == "silu":
        s = torch.sigmoid(g)
        active, slope = g * s, s * (1 + g * (1 - s))
    else:
        t = torch.tanh(_TANH_SCALE * (g + _TANH_CUBE * g**3))
        active = 0.5 * g * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * g * g)
    results = active * u, d * u * slope, d * active  # in float32 g, u and d are what is written to
    for target, result in zip((grad, gate, up), results, strict=True):
        target.copy_(result)


def kept(n: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Which of n elements a dropout of probability p keeps, `(n,) bool`: a hash of seed and place, nothing stored.

    The hash is MurmurHash3's 32-bit finalizer over `place * _STRIDE + seed`, whose result is kept where it is at
    least p 2^32; all arithmetic modulo 2^32.
    """
    mask = 0xFFFFFFFF
    h = (torch.arange(n, dtype=torch.int64, device=device) * _STRIDE + (seed & mask)) & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return (h ^ (h >> 16)) >= threshold(p)


def seed_from(seed: int, place: int) -> int:
    """The seed with which a piece that begins at `place` of a whole is dropped as it is within the whole."""
    return (seed + place * _STRIDE) & 0xFFFFFFFF


def threshold(p: float) -> int:
    """The smallest hash that is kept."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    """Into out: x with elements zeroed and the others times 1 / (1 - p); see `kept`."""
    mask = kept(x.numel(), p, seed, x.device).view(x.shape)
    out.copy_(torch.where(mask, _wide(x) * (1 / (1 - p)), 0.0))


def dropout_add_(total: Tensor, x: Tensor, p: float, seed: int) -> None:
    """total += dropout(x), one rounding."""
    mask = kept(x.numel(), p, seed, x.device).view(x.shape)
    total.copy_(_wide(total) + torch.where(mask, _wide(x) * (1 / (1 - p)), 0.0))


def cross_entropy_(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    """-log softmax(logits)[label] of each row `(n,) float32`; logits become their gradients, softmax - one-hot.

    With `softcap` c > 0 the logits are c tanh(logits / c) first, and the gradient is of what came in.
    """
    wide = _wide(logits)
    share = torch.tanh(wide / softcap) if softcap else wide
    capped = softcap * share if softcap else wide
    below = capped - capped.amax(dim=1, keepdim=True)
    picked = below.gather(1, labels[:, None])
    total = below.exp().sum(dim=1, keepdim=True).log()
    slope = torch.exp(below - total)
    slope.scatter_add_(1, labels[:, None], torch.full_like(picked, -1.0))
    logits.copy_(slope * (1 - share.square()) if softcap else slope)
    return (total - picked).squeeze(1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotary positions (Su et al. 2021), halves paired: x `(n, heads, width)`, cos and sin `(n, rotated)`.

    Only the first `rotated` channels turn; `inverse` turns them back, which is also the gradient.
    """
    rotated = cos.shape[-1]
    turned, rest = _wide(x[..., :rotated]), x[..., rotated:]
    first, second = turned.chunk(2, dim=-1)
    c, s = _wide(cos)[:, None], _wide(sin)[:, None]
    paired = torch.cat([-second, first], dim=-1)
    turned = turned * c - paired * s if inverse else turned * c + paired * s
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one token of each row `(n, heads, width)` to the cached ones, `(n, kv_heads, tokens, width)`."""
    n, heads, width = q.shape
    wide_q = _wide(q).view(n, k.shape[1], -1, width)
    shares = torch.softmax(wide_q @ _wide(k).transpose(2, 3) * scale, dim=-1)
    return (shares @ _wide(v)).to(q.dtype).view(n, heads, width)
