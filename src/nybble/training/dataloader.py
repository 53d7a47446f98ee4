"""Which rows each micro-batch of a training has, and the batches made of them.

The order of an epoch's rows follows from the seed and the epoch's number alone; it is the order that accelerate's
`SeedableRandomSampler` draws. So a place in a training is two numbers, the step and the micro-batch within it, and a
resumed training asks for its next micro-batch as any other does.

With several processes the micro-batch numbered i of a step belongs to process i modulo their number, so that the rows
of a step are the same whatever their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.data import IGNORED, Groups
from nybble.data.batches import NOTHING, Group
from nybble.recipe import TrainingSection
from nybble.run.processes import Processes


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once."""

    inputs: dict[str, Any]  # tensors on the host
    rows: tuple[int, ...]  # the numbers of the rows, from 1
    places: tuple[int, ...]  # of its examples, among all that are trained on
    lengths: tuple[int, ...]  # the tokens of each row; empty if nothing is learned from the batch
    n_tokens: int  # tokens without padding
    n_learned: int  # tokens that are learned


class StepLoader:
    """Makes the micro-batches of any optimizer step; `groups` are rows that are drawn together."""

    def __init__(
        self,
        groups: Groups,
        collate: Callable[[Sequence[Group]], dict[str, Any]],
        section: TrainingSection,
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        self._groups = groups
        self._collate = collate
        self._seed = section.seed if section.data_seed is None else section.data_seed
        self._processes = processes
        self.groups_a_micro_batch = section.per_device_train_batch_size
        self.groups_a_step = self.groups_a_micro_batch * section.gradient_accumulation_steps * processes.count
        self.steps_an_epoch = -(-len(groups) // self.groups_a_step)
        self._epoch = -1
        self._order: list[int] = []

    def micro_batches_of(self, step: int) -> list[MicroBatch]:
        """Those of this process in the optimizer step numbered `step`, from 0; each process has equally many.

        The last step of an epoch has fewer groups, and no group is drawn twice: a process that has none left is given
        a batch of which nothing is learned.
        """
        chosen = self._groups_of(step)
        size, count, rank = self.groups_a_micro_batch, self._processes.count, self._processes.rank
        starts = range(rank * size, -(-len(chosen) // (size * count)) * size * count, size * count)
        return [self._micro_batch(chosen[start : start + size]) for start in starts]

    def places_of(self, step: int) -> list[int]:
        """The places of the examples of a step, those of all processes, in the order of its micro-batches."""
        return [place for number in self._groups_of(step) for place in self._groups.places(number)]

    def _groups_of(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps_an_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self._groups), self._seed, epoch).tolist()
        first = within * self.groups_a_step
        return self._order[first : first + self.groups_a_step]

    def order_sha256(self, epoch: int) -> str:
        """A fingerprint of the order in which the groups of an epoch are drawn."""
        return order_sha256(len(self._groups), self._seed, epoch)

    def cursor(self, step: int, micro_batches: int) -> dict[str, Any]:
        """Where in the order of the rows a training is that has done `micro_batches` of the step numbered `step`."""
        epoch, within = divmod(step, self.steps_an_epoch)
        done = within * self.groups_a_step + micro_batches * self.groups_a_micro_batch
        return {
            "step": step,
            "micro_batches": micro_batches,
            "groups_a_micro_batch": self.groups_a_micro_batch,
            "groups_a_step": self.groups_a_step,
            "epoch": epoch,
            "groups": min(len(self._groups), done),
            "order_sha256": self.order_sha256(epoch),
        }

    def _micro_batch(self, numbers: Sequence[int]) -> MicroBatch:
        groups = [self._groups[number] for number in numbers]
        inputs = self._collate(groups or [NOTHING])
        lengths = tuple(len(example["input_ids"]) for group in groups for example in group)
        return MicroBatch(
            inputs=inputs,
            rows=tuple(row for number in numbers for row in self._groups.rows(number)),
            places=tuple(place for number in numbers for place in self._groups.places(number)),
            lengths=lengths,
            n_tokens=sum(lengths),
            n_learned=int((inputs["labels"][..., 1:] != IGNORED).sum()),
        )


def epoch_order(n_groups: int, seed: int, epoch: int) -> Tensor:
    """The numbers of `n_groups` groups in the order in which an epoch draws them."""
    return torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed + epoch))


def order_sha256(n_groups: int, seed: int, epoch: int) -> str:
    """A fingerprint of `epoch_order`."""
    return hashlib.sha256(epoch_order(n_groups, seed, epoch).numpy().tobytes()).hexdigest()
