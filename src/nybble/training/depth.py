"""How many decoder layers are computed again in the backward pass: as many as memory forces, batch by batch.

Training without recomputation costs 4 FLOP a weight and token under frozen weights, with all of it 6 (Chen et al.
2016), so a layer is only recomputed where its activations do not fit. What a layer keeps is counted on the model
itself, in two small forward passes; it grows with the number of tokens alone. The first layers are recomputed: their
turn in the backward pass comes last, when the activations of the others are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nybble.data import FlatBatch, PadBatch
from nybble.errors import RecipeError
from nybble.hardware import Device
from nybble.models import blocks_of
from nybble.nn.recompute import recomputed
from nybble.recipe import TrainingSection
from nybble.units import parse_bytes

_SAMPLE = (32, 64)  # tokens of the two passes that activations are counted in


@dataclass(frozen=True)
class Activations:
    """What a training step keeps for its backward pass, in bytes a token."""

    layers: tuple[float, ...]  # of each decoder layer when nothing is recomputed
    layer_input: float  # of a recomputed layer
    rest: float  # outside the layers

    def kept_bytes(self, n_tokens: int, n_recomputed: int) -> int:
        """Activations of a batch at the end of its forward pass, the first `n_recomputed` layers recomputed."""
        kept = self.rest + n_recomputed * self.layer_input + sum(self.layers[n_recomputed:])
        return int(kept * n_tokens)

    def peak_bytes(self, n_tokens: int, n_recomputed: int) -> int:
        """The same at the highest moment: with the working set of one layer's backward pass."""
        working = 1.5 * max(self.layers, default=0.0) if n_recomputed else 0.5 * max(self.layers, default=0.0)
        return self.kept_bytes(n_tokens, n_recomputed) + int(working * n_tokens)

    def depth_for(self, n_tokens: int, budget_bytes: float) -> int:
        """The fewest recomputed layers with which `n_tokens` stay within the budget; all of them if none does."""
        n_layers = len(self.layers)
        return next((n for n in range(n_layers) if self.peak_bytes(n_tokens, n) <= budget_bytes), n_layers)


class Recomputation:
    """Switches recomputation of a model's decoder layers, batch by batch."""

    def __init__(self, model: nn.Module, budget_bytes: Callable[[], float], activations: Activations | None) -> None:
        """`activations` None: all layers are recomputed always."""
        self._layers = decoder_layers(model)
        self._budget_bytes = budget_bytes
        self._activations = activations
        self.deepest = 0  # layers recomputed at most so far
        for layer in self._layers:
            layer._gradient_checkpointing_func = recomputed  # type: ignore[assignment]

    def prepare(self, n_tokens: int) -> int:
        """Set the layers for a batch of so many tokens; returns how many will be recomputed."""
        if self._activations is None:
            depth = len(self._layers)
        else:
            depth = self._activations.depth_for(n_tokens, self._budget_bytes())
        for number, layer in enumerate(self._layers):
            layer.gradient_checkpointing = number < depth  # type: ignore[assignment]
        self.deepest = max(self.deepest, depth)
        return depth


def recomputation_for(
    model: Any, section: TrainingSection, device: Device, compute_dtype: torch.dtype
) -> Recomputation | None:
    """What decides how many layers of `model` are recomputed; None where none ever is."""
    if section.gradient_checkpointing == "never" or not decoder_layers(model):
        return None
    if section.gradient_checkpointing == "always":
        return Recomputation(model, lambda: 0.0, None)
    collate = FlatBatch() if blocks_of(model).flattened else PadBatch(0)

    def sample(n_tokens: int) -> dict[str, Any]:
        batch = collate([[{"input_ids": [0] * n_tokens, "labels": [0] * n_tokens}]])
        return {k: v.to(device.torch_device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        activations = count_activations(model, sample)
    return Recomputation(model, partial(_activation_budget, model, memory_budget(section), device), activations)


def memory_budget(section: TrainingSection) -> int | None:
    """Bytes that the recipe lets training take, if it says so.

    Raises:
        RecipeError: not an amount of memory.
    """
    if section.memory_budget is None:
        return None
    try:
        return parse_bytes(section.memory_budget)
    except ValueError as error:
        raise RecipeError(f"training.memory_budget: {error}") from error


def _activation_budget(model: nn.Module, budget_bytes: int | None, device: Device) -> float:
    """Bytes that activations may take now: of the budget what weights, gradients and optimizer leave."""
    free = free_bytes(device.torch_device)
    if budget_bytes is not None:
        free = min(free, budget_bytes - used_bytes(device.torch_device))
    # Gradient and two moments in float32, which the first step makes.
    to_come = sum(12 * p.numel() for p in model.parameters() if p.requires_grad and p.grad is None)
    return 0.95 * (free - to_come)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can be recomputed, in order."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing") and _is_layer(module)]


def _is_layer(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def count_activations(model: nn.Module, batch_of: Callable[[int], dict[str, Any]]) -> Activations:
    """What the layers of `model` keep, by two forward passes over `batch_of(n_tokens)`."""
    small, large = (_kept_by_layer(model, batch_of(n)) for n in _SAMPLE)
    span = _SAMPLE[1] - _SAMPLE[0]
    slopes = [max(0.0, (b - a) / span) for a, b in zip(small, large, strict=True)]
    layers = decoder_layers(model)
    config: Any = model.config
    width = config.get_text_config().hidden_size
    element = next((p.element_size() for p in layers[0].parameters() if p.is_floating_point()), 2) if layers else 2
    return Activations(tuple(slopes[:-1]), width * element, slopes[-1])


def _kept_by_layer(model: nn.Module, batch: dict[str, Any]) -> list[int]:
    """Bytes that each decoder layer keeps, and last those outside them; each piece of memory counts once."""
    layers = decoder_layers(model)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = [0] * (len(layers) + 1)
    where = len(layers)

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            own.add(storage.data_ptr())
            alive.append(tensor)  # so that no other comes to lie at the same address
            kept[where] += storage.nbytes()
        return tensor

    @contextmanager
    def watched() -> Iterator[None]:
        nonlocal where
        handles = []
        for number, layer in enumerate(layers):

            def enter(*_: Any, number: int = number) -> None:
                nonlocal where
                where = number

            def leave(*_: Any) -> None:
                nonlocal where
                where = len(layers)

            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    alive: list[Tensor] = []
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), watched(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(**batch)
    finally:
        model.train(was_training)
    return kept


def free_bytes(device: torch.device) -> int:
    """What a training step may still take on `device`."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)


def used_bytes(device: torch.device) -> int:
    """What this process takes of `device` now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
