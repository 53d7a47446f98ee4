"""Seeds of dropout: a function of the run's seed, the micro-step and the layer, so that no state has to be stored.

A resumed run, a recomputed layer and another device draw the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MASK = (1 << 64) - 1


@dataclass
class DropoutSeeds:
    """The seeds that the layers of a model share; the training loop advances `micro_step`."""

    seed: int = 0
    micro_step: int | None = None  # None: outside Nybble's loop, where each call draws from torch's generator

    def of(self, place: int) -> int:
        """The seed of the dropout in layer number `place`, 32 bits."""
        if self.micro_step is None:
            return int(torch.randint(1 << 32, (), device="cpu"))
        return mixed(self.seed, self.micro_step, place) >> 32


def mixed(*parts: int) -> int:
    """A hash of some integers, 64 bits."""
    state = 0
    for part in parts:
        state = _splitmix(state ^ (part & _MASK))
    return state


def _splitmix(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
