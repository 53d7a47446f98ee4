"""The experts of a mixture, each expert's weights frozen and stored in 4 bits.

A family of transformers holds its experts as stacks, `gate_up_proj (E, 2I, H)` and `down_proj (E, H, I)`; some hold
them transposed, with biases, with gate and up interleaved, or without a gate. Here each stack holds one packed weight
for each expert and part, so no block crosses an expert:

    parts    gate and up apart, where the family has them one behind the other; else the projection as it is
    weight   rows are outputs and columns are inputs, for transposed families too

The codes of a stack are one parameter under the family's own name, so that PEFT finds it by `target_parameters`; the
scales are buffers. In a state dict each packed weight stands under a name of its own, with bitsandbytes' keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.kernels import dequantize
from nybble.kernels.pointwise import torch as pointwise
from nybble.nn.expert_step import ExpertAdapters, mixture
from nybble.nn.workspace import workspace
from nybble.quant import SUFFIXES, PackedWeight, from_bnb, to_bnb

_SCALES = ("absmax", "nested_absmax", "nested_offset")
DOWN = "down_proj"


@dataclass(frozen=True)
class Stack:
    """One projection of all experts."""

    n_experts: int
    out_features: int  # rows of an expert's weight
    in_features: int
    parts: tuple[str, ...]  # names of the packed weights that an expert's rows are stored as, each of as many rows

    @property
    def part_shape(self) -> tuple[int, int]:
        """Rows and columns of one packed weight."""
        return self.out_features // len(self.parts), self.in_features

    @property
    def n_elements(self) -> int:
        """Weights of all experts."""
        return self.n_experts * self.out_features * self.in_features


class Experts4bit(nn.Module):
    """The experts of one layer over packed weights; computes what the module of transformers that it replaces does.

    Until every weight was given by `set_packed`, it is an empty shell on the meta device.
    """

    def __init__(
        self, original: nn.Module, stacks: Mapping[str, Stack], inputs_first: bool, compute_dtype: torch.dtype
    ) -> None:
        """Take the place of `original`, which loses its weights.

        Args:
            original: the family's module, on the meta device or with weights; its biases and activation are kept.
            stacks: its projections, the down projection last.
            inputs_first: whether the family's stacks have inputs before outputs.
            compute_dtype: type of the products.
        """
        super().__init__()
        self.stacks = dict(stacks)
        self.compute_dtype = compute_dtype
        self.n_experts = stacks[DOWN].n_experts
        self.inputs_first = inputs_first
        self.is_transposed = bool(getattr(original, "is_transposed", False))  # what PEFT believes of the same
        self.quant_type, self.block_size, self.source_dtype = "nf4", 64, compute_dtype
        for name, stack in self.stacks.items():
            n_bytes = (stack.part_shape[0] * stack.part_shape[1] + 1) // 2
            # In the type of the weights until they come: transformers 5.17 casts what it reads to what is there.
            codes = torch.empty(self.n_experts, len(stack.parts), n_bytes, dtype=compute_dtype, device="meta")
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
            bias = getattr(original, f"{name}_bias", None)
            if bias is not None:
                self.register_parameter(f"{name}_bias", nn.Parameter(bias.detach(), requires_grad=False))
            for scale in _SCALES:
                self.register_buffer(f"{name}_{scale}", None)
            original.register_parameter(name, None)
            if bias is not None:
                original.register_parameter(f"{name}_bias", None)
        # It has no tensors left, and is asked for its activation alone; as a child it would be loaded and saved.
        self._original = (original,)
        self.activation = _known_activation(self.activate) if len(self._first().parts) == 2 else None

    def _first(self) -> Stack:
        return next(iter(self.stacks.values()))

    def activate(self, x: Tensor) -> Tensor:
        """What lies between the projections: `(n, rows of the first)` to `(n, columns of the second)`."""
        original: Any = self._original[0]
        if not getattr(original, "has_gate", True):
            return original.act_fn(x)  # type: ignore[no-any-return]
        if hasattr(original, "_apply_gate"):
            return original._apply_gate(x)  # type: ignore[no-any-return]
        gate, up = x.chunk(2, dim=-1)
        return original.act_fn(gate) * up  # type: ignore[no-any-return]

    def rename_parts(self, projection: str, names: tuple[str, ...]) -> None:
        """Let the packed weights of a projection have other names in a state dict."""
        self.stacks[projection] = replace(self.stacks[projection], parts=names)

    def bias_of(self, projection: str, expert: int) -> Tensor | None:
        """The bias of one expert, `(rows,)`, or None."""
        bias: Tensor | None = self._parameters.get(f"{projection}_bias")
        return None if bias is None else bias[expert]

    def set_packed(self, projection: str, expert: int, part: int, packed: PackedWeight) -> None:
        """Use `packed` as one of the weights; the first one decides the format and device of its stack.

        Raises:
            ValueError: shape or format is not that of the others.
        """
        stack = self.stacks[projection]
        if packed.shape != stack.part_shape:
            raise ValueError(f"shape {packed.shape} does not fit the experts' {stack.part_shape}")
        whole = {"": packed.packed, **{scale: getattr(packed, scale) for scale in _SCALES}}
        if self._buffers[f"{projection}_absmax"] is None:
            self._make_room(projection, packed, whole)
        if (packed.quant_type, packed.block_size) != (self.quant_type, self.block_size):
            raise ValueError(f"{packed.quant_type} in blocks of {packed.block_size} among others")
        for scale, tensor in whole.items():
            held = getattr(self, f"{projection}_{scale}" if scale else projection)
            if (held is None) != (tensor is None) or (tensor is not None and held.dtype != tensor.dtype):
                raise ValueError("scales of another format among others")
            if tensor is not None:
                held.data[expert, part].copy_(tensor.reshape(held.shape[2:]))

    def _make_room(self, projection: str, like: PackedWeight, tensors: Mapping[str, Tensor | None]) -> None:
        self.quant_type, self.block_size, self.source_dtype = like.quant_type, like.block_size, like.dtype
        leading = (self.n_experts, len(self.stacks[projection].parts))
        for scale, tensor in tensors.items():
            if tensor is None:
                continue
            shape = (*leading, *((tensor.numel(),) if scale != "nested_offset" else ()))
            room = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            if scale:
                setattr(self, f"{projection}_{scale}", room)
            else:
                setattr(self, projection, nn.Parameter(room, requires_grad=False))

    def packed(self, projection: str, expert: int, part: int) -> PackedWeight:
        """One weight, which shares memory with the module."""
        scales = (self._buffers[f"{projection}_{scale}"] for scale in _SCALES)
        absmax, nested, offset = (None if tensor is None else tensor[expert, part] for tensor in scales)
        codes: Tensor = self._parameters[projection].data[expert, part].unsqueeze(1)  # type: ignore[union-attr]
        shape = self.stacks[projection].part_shape
        return PackedWeight(codes, absmax, shape, self.block_size, self.quant_type, self.source_dtype, nested, offset)  # type: ignore[arg-type]

    def packed_weights(self) -> Iterator[tuple[str, PackedWeight]]:
        """Every packed weight under its name in a state dict, without the module's own name."""
        for projection, stack in self.stacks.items():
            for expert in range(stack.n_experts):
                for part, name in enumerate(stack.parts):
                    yield f"{expert}.{name}.weight", self.packed(projection, expert, part)

    @property
    def is_packed(self) -> bool:
        """Whether the weights were given."""
        return all(self._buffers[f"{name}_absmax"] is not None for name in self.stacks)

    @property
    def n_elements(self) -> int:
        """Weights of all experts."""
        return sum(stack.n_elements for stack in self.stacks.values())

    @property
    def n_packed(self) -> int:
        """Packed weights: one for each expert and part."""
        return sum(stack.n_experts * len(stack.parts) for stack in self.stacks.values())

    def packed_tensors(self) -> list[Tensor]:
        """Codes and scales."""
        names = [name for p in self.stacks for name in (p, *(f"{p}_{scale}" for scale in _SCALES))]
        return [tensor for tensor in (getattr(self, name) for name in names) if tensor is not None]

    @property
    def n_bytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.packed_tensors())

    def decoded(self, expert: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of one expert, `(out_features, in_features)` each, valid until the thread's next use of such."""
        shapes = {name: (stack.out_features, stack.in_features) for name, stack in self.stacks.items()}
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        codes: Tensor = self._parameters[DOWN]  # type: ignore[assignment]
        storage = torch.float32 if dtype == torch.float64 else dtype  # which decoding does not know
        piece = workspace.take((sum(sizes.values()),), codes, storage)
        made: dict[str, Tensor] = {}
        first = 0
        for name, shape in shapes.items():
            whole = piece[first : first + sizes[name]].view(shape)
            rows = self.stacks[name].part_shape[0]
            for part in range(len(self.stacks[name].parts)):
                dequantize(self.packed(name, expert, part), storage, whole[part * rows : (part + 1) * rows])
            made[name] = whole.to(dtype)
            first += sizes[name]
        return made

    def dequantize(self, projection: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole stack as numbers, laid out as in transformers; for comparisons, since it takes its full size."""
        stack = self.stacks[projection]
        experts = [
            torch.cat([dequantize(self.packed(projection, e, p), dtype or self.compute_dtype) for p in range(n)])
            for n in (len(stack.parts),)
            for e in range(stack.n_experts)
        ]
        whole = torch.stack(experts)
        return whole.transpose(1, 2).contiguous() if self.inputs_first else whole

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        adapters: ExpertAdapters | None = None,
    ) -> Tensor:
        """`(T, hidden)` to `(T, hidden)`, in the type of the input.

        Args:
            hidden_states: the tokens; without an index, the rows of expert 0, then as many of expert 1 (Llama 4).
            top_k_index: the experts of each token, `(T, k)`; numbers beyond the last expert are passed over.
            top_k_weights: what each expert's output is multiplied by, `(T, k)`.
            adapters: projection -> LoRA on all of its experts.
        """
        if top_k_index is None or top_k_weights is None:
            n_rows = len(hidden_states) // self.n_experts
            top_k_index = torch.arange(self.n_experts, device=hidden_states.device).repeat_interleave(n_rows)[:, None]
            top_k_weights = torch.ones_like(top_k_index, dtype=hidden_states.dtype)
        return mixture(hidden_states, top_k_index, top_k_weights, self, adapters or {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts4bit:
        """`.to()` and similar calls move the scales but never round them: other scales would give other weights."""
        names = [f"{projection}_{scale}" for projection in self.stacks for scale in _SCALES]
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        """Number, shapes and format, as `print(model)` shows them."""
        shapes = ", ".join(f"{name}={(s.out_features, s.in_features)}" for name, s in self.stacks.items())
        return f"{self.n_experts} experts, {shapes}, {self.quant_type}, block={self.block_size}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.is_packed:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name in (f"{projection}_bias" for projection in self.stacks):
            if self._parameters.get(name) is not None:
                destination[prefix + name] = getattr(self, name) if keep_vars else getattr(self, name).detach()
        for name, packed in self.packed_weights():
            destination[prefix + name] = packed.packed
            for suffix, tensor in to_bnb(packed).items():
                destination[f"{prefix}{name}.{suffix}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for projection, stack in self.stacks.items():
            for expert in range(stack.n_experts):
                for part, part_name in enumerate(stack.parts):
                    name = f"{prefix}{expert}.{part_name}.weight"
                    if name not in state_dict:
                        missing_keys.append(name)
                        continue
                    keys = [suffix for suffix in SUFFIXES if f"{name}.{suffix}" in state_dict]
                    companions = {suffix: state_dict.pop(f"{name}.{suffix}") for suffix in keys}
                    packed = from_bnb(state_dict.pop(name), companions, stack.part_shape)
                    self.set_packed(projection, expert, part, packed)
        n_missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # Codes and scales are saved under the names of the single weights.
        own = {prefix + name for name, _ in self.named_parameters(recurse=False) if not name.endswith("_bias")}
        own |= {prefix + name for name, _ in self.named_buffers(recurse=False)}
        missing_keys[n_missing:] = [key for key in missing_keys[n_missing:] if key not in own]


def _known_activation(activate: Callable[[Tensor], Tensor]) -> str | None:
    """The name of a gate that has a kernel of its own and gives the numbers of `activate`; None if there is none."""
    x = torch.linspace(-60, 60, 128, device="cpu").view(16, 8).t().contiguous()  # wide, to see limits of a family
    gate, up = (half.contiguous() for half in x.chunk(2, dim=-1))
    with torch.no_grad():
        wanted = activate(x)
        for name in ("silu", "gelu_tanh"):
            if torch.allclose(pointwise.gated(gate, up, name), wanted, rtol=1e-5, atol=1e-6):
                return name
    return None
