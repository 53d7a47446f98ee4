"""How the documents of a flattened batch are cut into chunks, and which token comes before which.

A chunk is `size` consecutive tokens of one segment, or fewer at its end. Its state begins with that of the chunk before
it: in the same segment, or the last one of the segment that this one continues (see `attention.segments`). Chunks are
numbered level by level, so that those of a level can be computed together: a level holds the n-th chunk of each path.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nybble.kernels.attention.segments import segments_of
from nybble.kernels.transfer import send

__all__ = ["Chunks", "Level", "chunks_of", "earlier_tokens"]


class Level(NamedTuple):
    """The chunks that can be computed together."""

    chunks: slice
    before: Tensor | None  # (n,) int64: of each, the place in the level before of the chunk whose state it continues


class Chunks(NamedTuple):
    """Where the tokens of a flattened batch are in its chunks."""

    n: int
    size: int
    token: Tensor  # (n * size,) int64: of each place the token, or T where there is none
    place: Tensor  # (T,) int64: of each token its place
    levels: tuple[Level, ...]


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def chunks_of(lengths: tuple[int, ...], parents: tuple[int, ...], size: int, device: torch.device) -> Chunks:
    """The chunks of a flattened batch of segments that are not empty."""
    found: list[tuple[int, int, int, int]] = []  # level, number of the chunk before or -1, first token, tokens
    last: list[int] = []  # of each segment its last chunk
    for start, length, _offset, parent in segments_of(lengths, parents):
        before = last[parent] if parent >= 0 else -1
        for first in range(start, start + length, size):
            level = found[before][0] + 1 if before >= 0 else 0
            found.append((level, before, first, min(size, start + length - first)))
            before = len(found) - 1
        last.append(before)
    order = sorted(range(len(found)), key=lambda chunk: found[chunk][0])
    numbers = {chunk: number for number, chunk in enumerate(order)}
    n_tokens = sum(lengths)
    token = torch.full((len(found), size), n_tokens, dtype=torch.int64, device="cpu")
    for number, chunk in enumerate(order):
        _level, _before, first, n = found[chunk]
        token[number, :n] = torch.arange(first, first + n, device="cpu")
    token = token.flatten()
    place = torch.empty(n_tokens + 1, dtype=torch.int64, device="cpu")
    place[token] = torch.arange(len(token), device="cpu")
    levels: list[Level] = []
    first_of_level = [0]
    for level in range(1 + max((chunk[0] for chunk in found), default=-1)):
        members = [chunk for chunk in order[first_of_level[-1] :] if found[chunk][0] == level]
        first_of_level.append(first_of_level[-1] + len(members))
        earlier = [numbers[found[chunk][1]] - first_of_level[-3] for chunk in members] if level else []
        places = send(torch.tensor(earlier, dtype=torch.int64, device="cpu"), device) if level else None
        levels.append(Level(slice(*first_of_level[-2:]), places))
    return Chunks(len(found), size, send(token, device), send(place[:n_tokens], device), tuple(levels))


@lru_cache(maxsize=8)
def earlier_tokens(lengths: tuple[int, ...], parents: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """`(n, T) int64`: of each token the one 0, 1, .. n - 1 before it on its path; T where there is none."""
    n_tokens = sum(lengths)
    earlier = torch.full((n, n_tokens), n_tokens, dtype=torch.int64, device="cpu")
    segments = segments_of(lengths, parents)
    for start, length, _offset, parent in segments:
        path = torch.arange(start, start + length, device="cpu")
        if parent >= 0:  # the last tokens of what it continues, which are known already
            end = segments[parent].start + segments[parent].length - 1
            path = torch.cat([earlier[: n - 1, end].flip(0), path])
        else:
            path = torch.cat([path.new_full((n - 1,), n_tokens), path])
        for steps in range(n):
            earlier[steps, start : start + length] = path[n - 1 - steps : len(path) - steps]
    return send(earlier, device)
