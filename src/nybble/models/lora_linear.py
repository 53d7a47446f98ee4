"""PEFT's LoRA layer with our arithmetic: its own class with another forward.

PEFT lets a layer class be registered (`LoraConfig._register_custom_module`, which it calls experimental); only this
file uses that. A single plain adapter, as in training, runs through `nybble.nn.lora_projection`. Several adapters, DoRA
and similar methods, and merged weights run through PEFT's own forward.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from nybble.models.lora_experts import ParamWrapper
from nybble.nn import Experts4bit, Linear4bit
from nybble.nn.dropout_seed import DropoutSeeds
from nybble.nn.lora_projection import Adapter, Projection, project, projection_of


class LoraLinear(lora.Linear):
    """A frozen linear, in 4 or 16 bits, with LoRA."""

    seeds: DropoutSeeds
    place: int
    plain = False  # True: PEFT's own forward, for comparisons

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.seeds, self.place = DropoutSeeds(), 0

    def projection(self) -> Projection | None:
        """What this layer computes now, or None if only PEFT's own forward can compute it."""
        base = projection_of(self.base_layer)
        if base is None or self.merged or self.plain:
            return None
        if self.disable_adapters:
            return base
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or names[0] in self.lora_variant or self.lora_B[names[0]].bias is not None:
            return None if names else base
        dropout = self.lora_dropout[names[0]]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        adapter = Adapter(
            a=self.lora_A[names[0]].weight,
            b=self.lora_B[names[0]].weight,
            scaling=self.scaling[names[0]],
            dropout=p,
            seed=self.seeds.of(self.place) if p else 0,
        )
        return Projection(base.layer, base.dtype, adapter)

    def forward(self, x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        """The output of the base plus that of the adapter, as in PEFT's layer."""
        projection = None if arguments or any(value is not None for value in settings.values()) else self.projection()
        if projection is None:
            return super().forward(x, *arguments, **settings)  # type: ignore[no-any-return]
        return project(x, (projection,))[0]


def use_our_layer(config: LoraConfig) -> None:
    """Let PEFT build our layers where `config` puts an adapter on a linear or on packed experts."""
    config._register_custom_module({Linear4bit: LoraLinear, nn.Linear: LoraLinear, Experts4bit: ParamWrapper})


def use_our_experts(config: LoraConfig) -> None:
    """Let PEFT build our layer where `config` puts an adapter on packed experts, as only that one can read them."""
    config._register_custom_module({Experts4bit: ParamWrapper})


def share_seeds(model: nn.Module, seeds: DropoutSeeds) -> None:
    """Let the dropout of every adapter in `model` follow `seeds`."""
    for place, layer in enumerate(m for m in model.modules() if isinstance(m, LoraLinear)):
        layer.seeds, layer.place = seeds, place
