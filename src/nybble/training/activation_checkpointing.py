"""Activation checkpointing: how many decoder layers are recomputed in the backward pass, batch by batch.

With frozen weights, training costs 4 FLOP a weight and token without recomputation and 6 with all of it (Chen et al.
2016), so a layer is recomputed only where its activations do not fit. The plan says how much memory a batch takes at
each level. The first layers are recomputed first: their turn in the backward pass comes last, when the activations of
the others have been freed. Where recomputing every layer is not enough, further levels apply the savers of
`nybble.models.memory_savers`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, nn

from nybble.errors import RecipeError
from nybble.hardware import Device, free_bytes, used_bytes
from nybble.models import MEMORY_SAVERS, MemorySavers, recomputable_layers, recompute_by, set_recomputed
from nybble.nn.recompute import recomputed
from nybble.recipe import StepMemory, TrainingSection

_SMALL_SHARE = 0.1  # below this share of trained parameters, gradients are copied so that a batch can be repeated
_SHARE = 0.95  # the part of a budget that is used, because the allocator leaves gaps between its blocks


class Recomputation:
    """Decides for each batch how many decoder layers are recomputed and which memory savers are on."""

    def __init__(
        self,
        model: nn.Module,
        memory: StepMemory | None,
        room: Room | None = None,
        savers: MemorySavers | None = None,
        *,
        shallowest: int = 0,
        always: Collection[str] = (),
    ) -> None:
        """Without `memory` or `room`, every layer is recomputed in every batch, with the savers in `always`.

        `shallowest` is the level that every batch takes at least.
        """
        self._layers = recomputable_layers(model)
        self._memory = memory if room is not None else None
        self._room = room
        self._savers = savers
        self._shallowest = shallowest
        self._always = always
        self._level = 0
        n_trained, n_all = (
            sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trained)
            for only_trained in (True, False)
        )
        self.may_copy_gradients = n_trained < _SMALL_SHARE * n_all
        self.depth = 0  # layers recomputed in the batch that was prepared last
        self.deepest = 0  # the largest depth of any batch so far
        self.taken: set[str] = set()  # the memory savers that any batch has needed so far
        recompute_by(self._layers, recomputed)

    def prepare(self, n_tokens: int) -> int:
        """Set the layers for a batch of `n_tokens`; returns how many will be recomputed."""
        if self._memory is None or self._room is None:
            self._set(len(self._layers))
        else:
            self._set(max(self._shallowest, self._memory.level_for(n_tokens, self._room.bytes_now())))
        return self.depth

    def deepen(self, n_tokens: int) -> bool:
        """Go at least one level deeper after a batch ran out of memory; False if this was the deepest already."""
        if self._memory is None or self._room is None or self._level == self._memory.n_levels - 1:
            return False
        before = self._level
        self._room.limit_to(_SHARE * self._memory.above_base(n_tokens, before))
        # Two levels may take the same memory, so the next level is not always a deeper one.
        self._set(max(before + 1, self._memory.level_for(n_tokens, self._room.bytes_now())))
        return True

    @property
    def in_words(self) -> str | None:
        """A note on what has been recomputed so far, if anything."""
        if not self.deepest:
            return None
        further = "".join(f"; {words}" for saver, words in MEMORY_SAVERS.items() if saver in self.taken)
        return f"up to {self.deepest} layers were recomputed to stay within memory{further}"

    def _set(self, level: int) -> None:
        self._level = level
        self.depth = min(level, len(self._layers))
        names = self._always if self._memory is None else self._memory.savers_at(level)
        set_recomputed(self._layers, self.depth)
        if self._savers is not None:
            self._savers.apply(names)
            self.taken.update(names)
        self.deepest = max(self.deepest, self.depth)


class SavedGradients:
    """The gradients of the micro-batches before this one, so that it can be computed again."""

    def __init__(self, trained: Iterable[Tensor], *, may_copy: bool) -> None:
        """`may_copy`: they are small enough for a copy; without one, nothing can be restored once there are any."""
        self._trained = list(trained)
        self._values: list[Tensor | None] = [None] * len(self._trained)
        self.can_restore = all(p.grad is None for p in self._trained)
        if not self.can_restore and may_copy:
            self._values = [None if p.grad is None else p.grad.clone() for p in self._trained]
            self.can_restore = True

    def restore(self) -> None:
        """Set them as they were."""
        for parameter, value in zip(self._trained, self._values, strict=True):
            parameter.grad = None if value is None else value.clone()


class Room:
    """The bytes that training may take beyond what is in use before it begins."""

    def __init__(self, device: Device, budget_bytes: int | None, n_beside: int = 1) -> None:
        """`n_beside`: the number of processes, including this one, that share the device's memory."""
        self._device = device.torch_device
        self._usable_share = device.usable_share
        self._n_beside = n_beside
        self._before = used_bytes(self._device)
        self._most = float("inf") if budget_bytes is None else float(budget_bytes - self._before)
        self._limit = float("inf")

    def bytes_now(self) -> float:
        """The free bytes, plus those that training itself has taken."""
        own = used_bytes(self._device) - self._before
        usable = self._usable_share * (free_bytes(self._device) // self._n_beside + own)
        return min(_SHARE * self._most, usable, self._limit)

    def limit_to(self, n_bytes: float) -> None:
        """Return at most `n_bytes` from now on."""
        self._limit = min(self._limit, n_bytes)


def recomputation_for(
    model: nn.Module, section: TrainingSection, device: Device, memory: StepMemory | None, n_beside: int = 1
) -> Recomputation | None:
    """The recomputation that a recipe asks for, in one of `n_beside` processes; None if it asks for none.

    Raises:
        RecipeError: `lean: always`, and no memory saver works on this model.
    """
    layers = recomputable_layers(model)
    savers = MemorySavers(model)
    if section.lean == "always":
        if not savers.available:
            raise RecipeError("training.lean always is for families that run through our blocks; set it to auto")
        return Recomputation(model, None, None, savers, always=savers.useful_on(device.shares_memory))
    if section.gradient_checkpointing == "never" or not layers:
        return None
    if memory is not None:
        savers.apply(memory.savers)  # first, because they change the room that is measured next
    shallowest = len(layers) if section.gradient_checkpointing == "always" else 0
    room = Room(device, section.memory_budget, n_beside)
    return Recomputation(model, memory, room, savers, shallowest=shallowest)
