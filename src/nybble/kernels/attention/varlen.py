"""torch's kernel for sequences of different lengths, on GPUs: one call for all documents, float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from nybble.kernels.attention.backend import AttentionBackend, computed_again, derive_by_autograd
from nybble.kernels.attention.segments import gather_paths, segments_of
from nybble.kernels.attention.torch import Settings
from nybble.kernels.transfer import send

__all__ = ["VARLEN", "VARLEN_TREE", "VARLEN_WINDOW", "missing", "varlen_attn"]


def missing() -> str | None:
    """Why torch's kernel cannot be called as it is here, in words; None if it can."""
    try:
        taken = signature(varlen_attn()).parameters
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    absent = {"scale", "window_size"} - taken.keys()
    return f"varlen_attn of torch {torch.__version__} takes no {' or '.join(sorted(absent))}" if absent else None


def varlen_attn() -> Callable[..., Tensor]:
    """torch's kernel."""
    from torch.nn.attention import varlen  # not in every torch; it registers operators when it is imported

    return cast(Callable[..., Tensor], varlen.varlen_attn)


def _takes(q: Tensor, settings: Settings) -> bool:
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return fits and not settings.softcap


def _attend(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    return (computed_again(_at_once) if settings.parents else _at_once)(q, k, v, settings)


def _at_once(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """One call of torch's kernel for sequences of different lengths."""
    function = varlen_attn()
    ends, longest = _ends(tuple(settings.lengths), q.device), max(settings.lengths)
    key_ends, most = ends, longest
    if settings.parents:
        # Causality and windows are counted from the ends of queries and keys, so queries may be fewer.
        k, v = (gather_paths(x, settings.lengths, settings.parents) for x in (k, v))
        segments = segments_of(settings.lengths, settings.parents)
        key_ends, most = _ends(tuple(segment.end for segment in segments), q.device), settings.longest
    # It counts the tokens before, and takes (-1, 0) for causal. Before `enable_gqa` heads could share keys unasked.
    window = (-1 if settings.window is None else settings.window - 1, 0)
    sharing = {"enable_gqa": True} if "enable_gqa" in signature(function).parameters else {}
    out = function(q, k, v, ends, key_ends, longest, most, scale=settings.scale, window_size=window, **sharing)
    return out.contiguous()


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0 and the end of each part, int32 on `device`."""
    with torch.inference_mode(False):  # a later step may save it for its backward
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return send(ends, device)


def _backend(takes: Callable[[Tensor, Settings], bool]) -> AttentionBackend:
    return AttentionBackend("varlen", missing, takes, _attend, derive_by_autograd(_attend))


def _takes_rows(q: Tensor, settings: Settings) -> bool:
    return not settings.parents and _takes(q, settings)


VARLEN = _backend(lambda q, settings: settings.window is None and _takes_rows(q, settings))
VARLEN_WINDOW = _backend(lambda q, settings: settings.window is not None and _takes_rows(q, settings))
VARLEN_TREE = _backend(lambda q, settings: bool(settings.parents) and _takes(q, settings))
