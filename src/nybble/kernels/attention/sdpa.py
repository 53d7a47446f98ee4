"""torch's own attention, a call for each document or run of documents of equal length."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nybble.kernels.attention.backend import AttentionBackend, computed_again, derive_by_autograd
from nybble.kernels.attention.segments import gather_paths, segments_of
from nybble.kernels.attention.torch import Settings

__all__ = ["SDPA"]

_MASKED = 1 << 24  # elements of a mask at most, 64 MiB in float32


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


def _per_segment(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """torch's attention per segment of trees, with a mask: its own causal kernels count from the first token."""
    segments = segments_of(settings.lengths, settings.parents)
    k, v = (gather_paths(x, settings.lengths, settings.parents) for x in (k, v))
    ends, pieces = [segment.end for segment in segments], []
    for segment, *parts in zip(segments, q.split(list(settings.lengths)), k.split(ends), v.split(ends), strict=True):
        queries, keys, values = (part.transpose(0, 1)[None] for part in parts)
        if q.device.type == "cuda" and q.shape[1] != k.shape[1]:
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        seen = torch.ones(segment.length, segment.end, dtype=torch.bool, device=q.device).tril_(segment.offset)
        causal = {"attn_mask": seen} if segment.offset else {"is_causal": True}
        scaling = {"scale": settings.scale, "enable_gqa": keys.shape[1] != q.shape[1]}
        result = scaled_dot_product_attention(queries, keys, values, **causal, **scaling)
        pieces.append(result[0].transpose(0, 1))
    return torch.cat(pieces)


def _attend(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    return (computed_again(_per_segment) if settings.parents else _per_document)(q, k, v, settings)


def _takes(_: Tensor, settings: Settings) -> bool:
    if not settings.parents:
        return not settings.softcap
    segments = segments_of(settings.lengths, settings.parents)
    largest = max(segment.length * segment.end for segment in segments if segment.offset)
    return not settings.softcap and not settings.window and largest <= _MASKED


def _shares_keys(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads of q that share keys keep the fast kernel."""
    if q.device.type != "cuda" or q.shape[1] == k.shape[1]:
        return True
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


SDPA = AttentionBackend(
    NAME="sdpa",
    unavailable=lambda: None,
    takes=_takes,
    attend=_attend,
    derive=derive_by_autograd(_attend),
)
