"""What one of several processes holds of a model in shards, and what it gathers at each moment of a step.

A process holds 1/N of weights, adapters, gradients and optimizer state. A unit (a layer, the table, the rest) is whole
only while it computes. FSDP2 keeps what came over the links next to the parameters that it is copied into, in the
forward pass until the next unit has come. In the backward pass the next layer comes while one computes:

    before the layers     the rest and the table, twice; the first layer, twice
    before a layer        the rest and the table; the layer, twice; the one before, as it came
    a layer, forward      the rest and the table; the layer, twice
    before the head       the rest and the table; a head of its own, twice; the last layer, as it came
    loss                  the same, without that layer where a head came after it; or the rest, twice: it comes again
    a layer, backward     the rest; the layer; the next, as it came; gradients of the one before, as they are sent
    update                nothing

The table is gathered for the forward pass alone. Shards that wait on the host come to the device for each gathering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nybble.models import count_parameters, decoder_layers, meta_model, tables
from nybble.planning.memory_tracer import Peak
from nybble.planning.traced_step import StepCost
from nybble.recipe import Recipe

_SHARDED = ("weights", "adapters", "gradients", "optimizer")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the units of a model as it is trained."""

    layer: int  # weights and adapters of the largest decoder layer
    layers: int  # of all
    embeddings: int  # where they are gathered by themselves, for the forward pass alone
    head: int  # the same
    table: int  # both as one tied weight, the same
    rest: int  # all else
    adapters: int  # of a layer, and as much for their gradients
    trained: int  # parameters, not bytes: 4 bytes each, and as many for their gradients

    @property
    def all_bytes(self) -> int:
        """Bytes of all weights and adapters."""
        return self.layers + self.embeddings + self.head + self.table + self.rest

    @property
    def passed(self) -> int:
        """Bytes that are gathered in a micro-batch, for its forward and backward passes."""
        return self.all_bytes + self.layers + self.rest

    @property
    def largest(self) -> int:
        """Bytes of the largest unit."""
        return max(self.layer, self.embeddings, self.head, self.table, self.rest)

    def gathered(self, section: str) -> int:
        """Bytes that are whole at the highest moment of a section; for an unknown section, of the step."""
        kind, _, place = section.partition(" ")
        ends = self.rest + self.table
        before_layers = 2 * ends + max(2 * self.embeddings, self.embeddings + 2 * self.layer)
        before_layer, before_head = ends + 3 * self.layer, ends + 2 * self.head + self.layer
        if kind == "gather":
            return before_head if place == "head" else before_layer
        known = {
            "update": 0,
            "forward": ends + 2 * self.layer if place else before_layers,
            "loss": max(2 * self.rest, ends + (2 * self.head or self.layer)),
            "backward": self.rest + 2 * self.layer + self.adapters,
        }
        return known.get(kind, max(before_layers, before_layer, before_head))

    @classmethod
    def of(cls, config: Any, recipe: Recipe, dtype: torch.dtype) -> Sizes:
        """The sizes of a model, read off it on the meta device, without any weight."""
        model = meta_model(config, recipe, dtype)
        layers = decoder_layers(model)
        in_layers = [_bytes_of([layer]) for layer in layers]
        largest = max(layers, key=lambda layer: _bytes_of([layer]))
        apart = [_bytes_of(unit) for unit in tables(model)]
        embeddings, head, table = {0: (0, 0, 0), 1: (0, 0, *apart), 2: (*apart, 0)}[len(apart)]
        rest = _bytes_of([model]) - sum(in_layers) - sum(apart)
        trained = sum(p.numel() for p in largest.parameters() if p.requires_grad)
        all_trained = count_parameters(model)[0]
        return cls(max(in_layers), sum(in_layers), embeddings, head, table, rest, 4 * trained, all_trained)


def _bytes_of(modules: list[torch.nn.Module]) -> int:
    found = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in found}.values())


@dataclass(frozen=True)
class Shards:
    """The share of one of `n` processes."""

    n: int
    sizes: Sizes
    on_host: bool  # shards wait in host memory

    def of(self, work: StepCost) -> StepCost:
        """What `work`, which is that of the whole model, takes in this process."""
        peaks = {}
        for section, peak in work.peaks.items():
            parts = {**self._share(peak.parts), "gathered": self._gathered(section)}
            peaks[section] = Peak(sum(parts.values()), parts)
        waiting = self.sizes.all_bytes + 3 * 4 * self.sizes.trained  # with gradients and Adam's two moments
        host = work.host_bytes + (waiting // self.n if self.on_host else 0)
        return replace(work, peaks=peaks, rest=self._share(work.rest), host_bytes=host)

    def _share(self, parts: Mapping[str, int]) -> dict[str, int]:
        mine = {part: 0 if self.on_host else parts[part] // self.n for part in _SHARDED if part in parts}
        return {**parts, **mine}

    def _gathered(self, section: str) -> int:
        whole = self.sizes.gathered(section)
        return whole + whole // self.n if self.on_host else whole
