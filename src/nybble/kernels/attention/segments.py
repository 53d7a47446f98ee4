"""Trees of segments: documents that begin with the same tokens hold them once.

The segments of a flattened batch follow one another. `parents` gives for each the index of the segment that it
continues, or -1; segments come in pre-order, so a parent is the segment before or one of that segment's ancestors. A
token sees the tokens of its segment's ancestors, and those of its segment up to itself: it sees its path from the root,
and nothing of other branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.kernels.transfer import send

__all__ = ["Segment", "check_parents", "gather_paths", "path_of", "segments_of"]


class Segment(NamedTuple):
    """Consecutive tokens of one document."""

    start: int  # index of the first token in the flattened batch
    length: int
    offset: int  # tokens of its ancestors
    parent: int  # index of a segment, or -1

    @property
    def end(self) -> int:
        """Tokens of its path: its own, and those of its ancestors."""
        return self.offset + self.length


def segments_of(lengths: Sequence[int], parents: Sequence[int]) -> tuple[Segment, ...]:
    """The segments of a flattened batch; without parents, each is a document."""
    return _segments_of(tuple(lengths), tuple(parents))


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _segments_of(lengths: tuple[int, ...], parents: tuple[int, ...]) -> tuple[Segment, ...]:
    made: list[Segment] = []
    for start, length, parent in zip(
        accumulate(lengths, initial=0), lengths, parents or (-1,) * len(lengths), strict=False
    ):
        made.append(Segment(start, length, made[parent].end if parent >= 0 else 0, parent))
    return tuple(made)


def path_of(segments: Sequence[Segment], index: int) -> list[int]:
    """The indices of a segment's ancestors from the root on, and its own."""
    path = [index]
    while segments[path[-1]].parent >= 0:
        path.append(segments[path[-1]].parent)
    return path[::-1]


def check_parents(lengths: Sequence[int], parents: Sequence[int]) -> None:
    """Check that the segments come in pre-order and are not empty.

    Raises:
        ValueError: they do not, or some are.
    """
    if len(parents) != len(lengths) or min(lengths, default=1) < 1:
        raise ValueError(f"each segment needs tokens and a parent, got {len(lengths)} lengths, {len(parents)} parents")
    path = [-1]
    for index, parent in enumerate(parents):
        while path and path[-1] != parent:
            path.pop()
        if not path:
            raise ValueError(
                f"segments must be in pre-order: segment {index} cannot continue segment {parent}, which is neither "
                "the segment before it nor an ancestor of that one"
            )
        path.append(index)


def gather_paths(x: Tensor, lengths: Sequence[int], parents: Sequence[int]) -> Tensor:
    """The rows of `x`, `(T, ..)`, of each segment's path, one path after the other; can be differentiated.

    Gradients of a row that several paths share are summed in float32 (float64 for float64), in the order of the paths.
    """
    gathered: Tensor = _Gather.apply(x, tuple(lengths), tuple(parents))
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], parents: tuple[int, ...]) -> Tensor:
        ctx.places = path_places(lengths, parents, x.device)
        ctx.sizes = [segment.end for segment in segments_of(lengths, parents)]
        ctx.n = len(x)
        return x[ctx.places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.n, *grad.shape[1:], dtype=wide)
        # A path holds no token twice, so each addition has one order of sums.
        for places, part in zip(ctx.places.split(ctx.sizes), grad.split(ctx.sizes), strict=True):
            total.index_add_(0, places, part.to(wide))
        return total.to(grad.dtype), None, None


@lru_cache(maxsize=8)
def path_places(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device) -> Tensor:
    """The tokens of each segment's path, one path after the other, `(sum of the paths' lengths,) int64`."""
    segments = segments_of(lengths, parents)
    with torch.inference_mode(False):  # a later step may save it for its backward
        own = [torch.arange(s.start, s.start + s.length, device="cpu") for s in segments]
        places = torch.cat([own[i] for index in range(len(segments)) for i in path_of(segments, index)])
        return send(places, device)
