"""The kinds of blocks that Nybble computes in the place of transformers' code.

A kind recognises modules by their parts and offers forwards for them, most wanted first. Each is called exactly as the
class's own forward is, and is taken only where it gives the same numbers (`nybble.models.blocks.proof`). It falls back
to the class's own forward wherever it does not apply: trained weights, several adapters, generation with a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from nybble.models.blocks.attention import attention_forwards
from nybble.models.blocks.mlp import mlp_forwards
from nybble.models.blocks.norm import norm_forwards
from nybble.models.blocks.recurrent import recurrent_forwards

Forward = Callable[..., Any]  # of a module and what its class's own forward takes


class Kind(NamedTuple):
    """One kind of block."""

    name: str  # for people, and in reports
    forwards: Callable[[nn.Module], Sequence[Forward]]  # what can be tried on a module; it may be on the meta device
    needs_rows: bool = False  # whether it makes a difference in flattened batches alone


KINDS = (
    Kind("attention", attention_forwards, needs_rows=True),
    Kind("recurrent", recurrent_forwards, needs_rows=True),
    Kind("mlp", mlp_forwards),
    Kind("norm", norm_forwards),
)


def use_forward(module: nn.Module, forward: Forward) -> None:
    """Let this one module compute by `forward`."""
    module.forward = MethodType(forward, module)
