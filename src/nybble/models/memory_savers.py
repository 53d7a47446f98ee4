"""Memory savers: what a model that runs through our blocks can do beyond recomputing all of its layers.

    inputs      layer inputs wait on the host
    embedding   the embedding table stays on the host
    tiles       the MLP runs on some of the tokens at a time
    slices      4-bit weights are decoded some rows at a time, and no memory is held between uses

`nybble.nn` implements each of them, and none changes what is learned. A plan applies them in this order, one more
at each level, and only where the level before is not enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType, MethodType
from typing import Any

from torch import nn

from nybble.models.blocks import blocks_of
from nybble.models.skeleton import base_of, decoder_layers, recompute_by
from nybble.nn import Linear4bit
from nybble.nn.host_memory import HostEmbedding, HostStore
from nybble.nn.recompute import recomputed
from nybble.nn.workspace import workspace

MEMORY_SAVERS: Mapping[str, str] = MappingProxyType(
    {
        "inputs": "layer inputs wait on the host",
        "embedding": "the embedding table stays on the host",
        "tiles": "the MLP runs in tiles",
        "slices": "weights are decoded in slices",
    }
)
_ON_HOST = ("inputs", "embedding")  # these save nothing where device and host share their memory
_SLICE_ELEMENTS = 1 << 24  # at least, 34 MB in 16 bits: thousands of rows
_SLICES = 4  # of one weight, at most


class MemorySavers:
    """Switches the memory savers of one model on and off, batch by batch."""

    def __init__(self, model: Any) -> None:
        """`model` may be bare or have adapters."""
        base = base_of(model)
        blocks = blocks_of(model)
        self._layers: list[Any] = decoder_layers(base) if blocks.flattened else []
        self._linears = [m for layer in self._layers for m in layer.modules() if isinstance(m, Linear4bit)]
        self._has_tiles = bool(blocks.blocks.get("mlp"))
        # Blocks of ours; an MLP among them reads how many rows it takes at a time.
        self._blocks: list[Any] = [m for layer in self._layers for m in layer.modules() if "forward" in vars(m)]
        self._store = HostStore()
        table = base.get_input_embeddings()
        is_alone = type(table) is nn.Embedding and not table.weight.requires_grad
        self._table = table if self._layers and is_alone and not base.config.tie_word_embeddings else None
        self._applied: frozenset[str] | None = None  # None: whatever an earlier training has left

    @property
    def available(self) -> tuple[str, ...]:
        """The savers that this model has, in the order of `MEMORY_SAVERS`."""
        has = {
            "inputs": bool(self._layers),
            "embedding": self._table is not None,
            "tiles": self._has_tiles,
            "slices": bool(self._linears),
        }
        return tuple(name for name in MEMORY_SAVERS if has[name])

    def useful_on(self, shares_memory: bool) -> tuple[str, ...]:
        """The savers that make a step smaller on a device that shares its memory with the host, or does not."""
        return tuple(name for name in self.available if not (shares_memory and name in _ON_HOST))

    def apply(self, names: Collection[str]) -> None:
        """Switch on the named savers and switch off the others; a table that is on the host stays there."""
        self._store.clear()
        wanted = frozenset(names)
        if wanted != self._applied:
            self._switch(wanted)

    def _switch(self, names: frozenset[str]) -> None:
        recompute_by(self._layers, self._store.recomputed if "inputs" in names else recomputed)
        for block in self._blocks:
            block.nybble_tiles = "tiles" in names
        for linear in self._linears:
            size = linear.in_features * linear.out_features
            linear.slice_elements = max(_SLICE_ELEMENTS, -(-size // _SLICES)) if "slices" in names else 0
        workspace.keep("slices" not in names)
        table = self._table
        if table is not None and "embedding" in names and "forward" not in vars(table):
            table.forward = MethodType(HostEmbedding(table), table)
        self._applied = names

    @property
    def on_host(self) -> list[nn.Parameter]:
        """The weights that lie on the host."""
        table = self._table
        return [table.weight] if table is not None and "forward" in vars(table) else []
