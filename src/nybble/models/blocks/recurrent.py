"""Recurrent layers over flattened rows: their states and convolutions begin anew with each row.

transformers writes these layers (gated delta rule, Mamba, short convolutions) with a few functions of the same names
and arguments in every family, and each layer projects, gates and norms in its own way around them. So a layer keeps its
class's own forward, which only finds our functions by those names; no module or class of transformers is changed.
Whatever else a forward does must not carry anything from one token to the next; the proof finds out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from nybble.nn.linear_attention import convolve_rows, delta_rule_rows, mamba2_rows, mamba_rows
from nybble.nn.rows import current_rows

# Names of transformers' functions -> ours, which are given the rows first.
_OURS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolve_rows,
    "torch_chunk_gated_delta_rule": delta_rule_rows,
    "chunk_kimi_delta_attention": delta_rule_rows,
    "mamba2_chunk_scan": mamba2_rows,
    "mamba_selective_scan": mamba_rows,
}
# Whole layers in one kernel, where a package has it: None has the layer run part by part.
_WHOLE = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")


def recurrent_forwards(module: nn.Module) -> Sequence[Callable[..., Any]]:
    """The forward for `module`, if its class's own calls one of the functions that we have."""
    owner: Any = type(module)
    return [_forward] if _over_rows(owner) else []


def _forward(module: nn.Module, *arguments: Any, **settings: Any) -> Any:
    owner: Any = type(module)
    forward = owner.forward if current_rows() is None else _over_rows(owner)
    return forward(module, *arguments, **settings)


@cache
def _over_rows(owner: Any) -> Any:
    """The forward of a class with our functions in the place of transformers'; None if it calls none of them."""
    own = inspect.unwrap(owner.forward)
    if not isinstance(own, FunctionType) or not _OURS.keys() & set(own.__code__.co_names):
        return None
    found: dict[str, Any] = {name: partial(_with_rows, ours) for name, ours in _OURS.items()}
    found |= dict.fromkeys(_WHOLE, _nothing) | {"apply_mask_to_padding_states": _as_it_is}
    changed = FunctionType(own.__code__, own.__globals__ | found, own.__name__, own.__defaults__, own.__closure__)
    changed.__kwdefaults__ = own.__kwdefaults__
    return changed


def _with_rows(ours: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    return ours(current_rows(), *arguments, **settings)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _as_it_is(hidden_states: Tensor, _mask: Any) -> Tensor:
    return hidden_states  # no row of a flattened batch is padded
