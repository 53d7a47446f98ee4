"""The ladder below full recomputation, for a model that runs through our blocks.

    inputs      layer inputs wait on the host
    embedding   the embedding table stays on the host
    tiles       the MLP runs some tokens at a time
    slices      4-bit weights are decoded some rows at a time, and no memory is held between uses

`nybble.nn` says how each is done; nothing that is learned changes. A plan takes them in this order, each only where
those before are not enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType, MethodType
from typing import Any

from torch import nn

from nybble.models.families import blocks_of
from nybble.models.skeleton import base_of, decoder_layers
from nybble.nn import Linear4bit
from nybble.nn.lean import HostEmbedding, HostStore
from nybble.nn.recompute import recomputed
from nybble.nn.scratch import scratch

RUNGS: Mapping[str, str] = MappingProxyType(
    {
        "inputs": "layer inputs wait on the host",
        "embedding": "the embedding table stays on the host",
        "tiles": "the MLP runs in tiles",
        "slices": "weights are decoded in slices",
    }
)
_ON_HOST = ("inputs", "embedding")  # these gain nothing where device and host share their memory
_SLICE_ELEMENTS = 1 << 24  # at least, 34 MB in 16 bits: thousands of rows
_SLICES = 4  # of one weight, at most


class Ladder:
    """Switches the rungs of one model, batch by batch."""

    def __init__(self, model: Any) -> None:
        """`model` bare or with adapters."""
        base = base_of(model)
        blocks = blocks_of(model)
        self._layers: list[Any] = decoder_layers(base) if blocks.flattened else []
        self._linears = [m for layer in self._layers for m in layer.modules() if isinstance(m, Linear4bit)]
        self._has_tiles = bool(blocks.blocks.get("mlp"))
        self._store = HostStore()
        table = base.get_input_embeddings()
        is_alone = type(table) is nn.Embedding and not table.weight.requires_grad
        self._table = table if self._layers and is_alone and not base.config.tie_word_embeddings else None
        self._taken: frozenset[str] | None = None  # None: whatever a former training has left

    @property
    def rungs(self) -> tuple[str, ...]:
        """Those that this model has, in their order."""
        has = {
            "inputs": bool(self._layers),
            "embedding": self._table is not None,
            "tiles": self._has_tiles,
            "slices": bool(self._linears),
        }
        return tuple(rung for rung in RUNGS if has[rung])

    def gaining(self, shares_memory: bool) -> tuple[str, ...]:
        """Those that make a step smaller, on a device that shares its memory with the host or not."""
        return tuple(rung for rung in self.rungs if not (shares_memory and rung in _ON_HOST))

    def take(self, rungs: Collection[str]) -> None:
        """These from now on, and no others; but a table that is on the host stays there."""
        self._store.clear()
        wanted = frozenset(rungs)
        if wanted != self._taken:
            self._switch(wanted)

    def _switch(self, rungs: frozenset[str]) -> None:
        for layer in self._layers:
            layer._gradient_checkpointing_func = self._store.recomputed if "inputs" in rungs else recomputed
            layer.mlp.nybble_tiles = "tiles" in rungs
        for linear in self._linears:
            size = linear.in_features * linear.out_features
            linear.slice_elements = max(_SLICE_ELEMENTS, -(-size // _SLICES)) if "slices" in rungs else 0
        scratch.keep("slices" not in rungs)
        table = self._table
        if table is not None and "embedding" in rungs and "forward" not in vars(table):
            table.forward = MethodType(HostEmbedding(table), table)
        self._taken = rungs

    @property
    def on_host(self) -> list[nn.Parameter]:
        """Weights that lie on the host."""
        table = self._table
        return [table.weight] if table is not None and "forward" in vars(table) else []
