"""PEFT's LoRA on a stack of experts (`target_parameters`) with our arithmetic: its own class with another forward.

PEFT puts one wrapper on each stack, one inside the other, and its forward would add to the stack's codes as to numbers.
Here the outermost wrapper hands the factors of all of them to the experts.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor

from nybble.errors import ModelError
from nybble.nn import Experts4bit
from nybble.nn.lora_projection import Adapter


class ParamWrapper(lora.ParamWrapper):
    """One stack of experts in 4 bits with LoRA; it has PEFT's name, by which PEFT knows what it may wrap again."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """Sizes as PEFT reads them from a stack in 16 bits, whose codes have others."""
        experts = self._experts()
        stack = experts.stacks[self.parameter_name]
        self.num_experts, self._param_ndim = stack.n_experts, 3
        # A family whose stacks have inputs first without saying so, as Llama 4: PEFT puts A on the outputs.
        self.is_flipped = experts.inputs_first and not experts.is_transposed
        sizes = (stack.in_features, stack.out_features)
        return sizes if experts.inputs_first else sizes[::-1]

    def _experts(self) -> Experts4bit:
        experts = self.get_base_layer()
        if not isinstance(experts, Experts4bit):
            raise TypeError(f"expected experts in 4 bits, got {type(experts).__name__}")
        return experts

    def get_delta_weight(self, adapter_name: str, *_arguments: Any, **_settings: Any) -> Tensor:
        """Refused: PEFT would add it to codes.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "an adapter cannot be merged into packed 4-bit weights without losing it; use `nybble merge RUN --out DIR` "
            "(nybble.merge), which writes a whole model"
        )

    def adapter(self) -> Adapter | None:
        """The adapters that are active now as one, or None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not names:
            return None
        factors = [self._factors(name) for name in names]
        if len(names) == 1:
            return Adapter(*factors[0], self.scaling[names[0]], 0.0, 0)
        # Side by side within each expert, where the experts' order is that of one adapter.
        n, columns, rows = self.num_experts, factors[0][0].shape[1], len(factors[0][1])
        a = torch.cat([a.view(n, -1, columns) for a, _ in factors], dim=1).reshape(-1, columns)
        scaled = [self.scaling[name] * b.view(rows, -1, n) for name, (_, b) in zip(names, factors, strict=True)]
        return Adapter(a, torch.cat(scaled, dim=1).reshape(rows, -1), 1.0, 0.0, 0)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A `(E r, in)` and B `(out, r E)` of one adapter."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if not self.is_flipped:
            return a, b
        n = self.num_experts
        of_inputs = b.view(len(b), -1, n).permute(2, 1, 0).reshape(-1, len(b))
        return of_inputs, a.view(n, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)

    def forward(self, x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        """The experts with the adapters of this wrapper and of those inside it."""
        found: dict[str, Adapter] = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            adapter = layer.adapter()
            if adapter is not None:
                found[layer.parameter_name] = adapter
            layer = layer.base_layer
        return layer(x, *arguments, **settings, adapters=found)  # type: ignore[no-any-return]
