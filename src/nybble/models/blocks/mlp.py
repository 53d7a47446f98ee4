"""The gated MLP, and how little of it may be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from nybble.nn.gated_mlp import GatedMlp
from nybble.nn.lora_projection import projection_of

_TILE_ROWS = 1024  # of an MLP in tiles, at least: a product with as many rows is as fast as a larger one
_TILES = 8  # at most
_ACTIVATIONS = ("silu", "gelu_tanh")
# Names of the linears: gate, up and down, or one with the rows of gate and up, and down.
_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("input_linear", "output_linear"),
    ("fc1", "fc2"),
)


class Surroundings(NamedTuple):
    """What the code around an MLP does with its input and its output."""

    keeps_output: bool  # a norm behind the MLP does
    shares_input: bool  # other modules get the same tensor, so that its gradient must not take its place


ANYWHERE = Surroundings(keeps_output=True, shares_input=True)  # always right, with the most memory


def mlp_forwards(module: nn.Module) -> Sequence[Callable[..., Any]]:
    """Forwards for an MLP of two or three linears: one for each activation."""
    names = next((n for n in _NAMES if all(isinstance(getattr(module, part, None), nn.Module) for part in n)), None)
    return () if names is None else [partial(_mlp, ANYWHERE, act, names) for act in _ACTIVATIONS]


def in_surroundings(forward: Callable[..., Any], surroundings: Surroundings) -> Callable[..., Any]:
    """The same MLP elsewhere; any other forward as it is."""
    if isinstance(forward, partial) and forward.func is _mlp:
        return partial(_mlp, surroundings, *forward.args[1:])
    return forward


def _mlp(around: Surroundings, activation: str, names: tuple[str, ...], module: Any, x: Tensor) -> Tensor:
    projections = [projection_of(getattr(module, name)) for name in names]
    plain = [p for p in projections if p is not None and not p.has_trained_bias]
    if len(plain) < len(projections) or len({p.dtype for p in plain}) != 1 or not x.numel():
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    wanted = getattr(module, "nybble_tiles", 0)  # True, or rows of a tile at least
    least = _TILE_ROWS if wanted is True else wanted
    tile = max(least, -(-x.numel() // (x.shape[-1] * _TILES))) if least else 0
    takes_x = not around.shares_input
    return GatedMlp(tuple(plain[:-1]), plain[-1], activation, around.keeps_output, tile, takes_x)(x)
