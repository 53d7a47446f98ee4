"""torch's own attention, a call for each document or run of documents of equal length."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nybble.kernels.attention.backend import AttentionBackend, derive_by_autograd
from nybble.kernels.attention.torch import Settings

__all__ = ["SDPA"]


def _per_document(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """torch's attention per document; documents of equal length that follow each other go together."""
    window, pieces = settings.window, []
    runs = [(length, len(list(same))) for length, same in groupby(settings.lengths)]
    sizes = [length * n for length, n in runs]
    # `split`, not slices: its backward is one concatenation, theirs a tensor of T zeros each.
    for (length, n), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        if window is not None and window < length:
            pieces.append(torch.ops.nybble.attend(*parts, [length] * n, *settings[1:])[0])
            continue
        queries, keys, values = (part.unflatten(0, (n, length)).transpose(1, 2) for part in parts)
        if not _shares_keys(queries, keys, values):
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        scaling = {"is_causal": True, "scale": settings.scale, "enable_gqa": keys.shape[1] != q.shape[1]}
        result = scaled_dot_product_attention(queries, keys, values, **scaling)
        pieces.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()


def _shares_keys(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads of q that share keys keep the fast kernel."""
    if q.device.type != "cuda" or q.shape[1] == k.shape[1]:
        return True
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


SDPA = AttentionBackend(
    NAME="sdpa",
    unavailable=lambda: None,
    takes=lambda _, settings: not settings.softcap,
    attend=_per_document,
    derive=derive_by_autograd(_per_document),
)
