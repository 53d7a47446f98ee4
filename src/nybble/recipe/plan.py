"""The plan: what a run will do and how much memory it will take, before any weight is read.

`nybble.planning` makes it; this module holds its data and how people read it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Any

from nybble.errors import CannotRunError
from nybble.units import format_bytes, format_seconds


@dataclass(frozen=True)
class PhasePlan:
    """The peak memory of one phase of a run."""

    name: str
    peak_bytes: int
    parts: dict[str, int]  # weights, adapters, gradients, ..., adding up to the peak

    @property
    def live_bytes(self) -> int:
        """Bytes of tensors, without the device's context and the allocator."""
        return self.peak_bytes - self.parts.get("context", 0) - self.parts.get("allocator", 0)


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes of a training step, by the tokens of the batch and by memory saver level.

    Levels 0 to n recompute that many of the n layers. Each further level, in `saver_levels`, recomputes all layers and
    applies memory savers as well (`nybble.models.memory_savers`).
    """

    tokens: tuple[int, ...]  # of the batches that were traced, ascending
    peaks: tuple[tuple[int, ...], ...]  # bytes for each of them, by level
    base_bytes: int  # of these, the bytes before training: weights and adapters
    saver_levels: tuple[tuple[str, ...], ...] = ()
    savers: tuple[str, ...] = ()  # memory savers that every level applies

    @property
    def n_levels(self) -> int:
        """The number of levels, counted from 0."""
        return len(self.peaks[0])

    def savers_at(self, level: int) -> tuple[str, ...]:
        """The memory savers that a level applies."""
        beyond = level - (self.n_levels - len(self.saver_levels))
        return (*self.savers, *(self.saver_levels[beyond] if beyond >= 0 else ()))

    def above_base(self, n_tokens: int, level: int) -> int:
        """Peak bytes of a step beyond weights and adapters.

        The peak is the largest of several linear functions of the tokens, so a straight line between two batches lies
        on or above it. Beyond the largest batch the last line is extended.
        """
        right = min(max(bisect_left(self.tokens, n_tokens), 1), len(self.tokens) - 1)
        if right == 0:
            return self.peaks[0][level] - self.base_bytes
        (x0, x1), (y0, y1) = (
            self.tokens[right - 1 : right + 1],
            (row[level] for row in self.peaks[right - 1 : right + 1]),
        )
        at = y0 + (y1 - y0) * (max(n_tokens, self.tokens[0]) - x0) / (x1 - x0)
        return int(at) - self.base_bytes

    def level_for(self, n_tokens: int, room_bytes: float) -> int:
        """The first level at which a batch fits into the room; the last level if it fits at none."""
        last = self.n_levels - 1
        fits = (level for level in range(last) if self.above_base(n_tokens, level) <= room_bytes)
        return next(fits, last)


@dataclass(frozen=True)
class LevelPlan:
    """The memory of the longest batch at one memory saver level (`nybble.models.memory_savers`)."""

    name: str
    peak_bytes: int
    live_bytes: int  # of these, tensors
    host_bytes: int  # kept on the host
    taken: bool


@dataclass(frozen=True)
class Change:
    """A change of settings that makes a run smaller, and the peak memory with it."""

    setting: str
    value: str
    peak_bytes: int
    fits: bool
    meaning: str  # what the change costs, in words


@dataclass(frozen=True)
class Plan:
    """What a run will do and take, which follows from recipe, model, rows and device."""

    rows: int
    rows_per_step: int  # over all micro-batches and processes
    optimizer_steps: int
    gradient_checkpointing: str  # auto, never or always
    device: dict[str, Any] = field(default_factory=dict)  # name, rates, and whether they are estimates
    budget_bytes: int | None = None
    fits: bool = True
    phases: tuple[PhasePlan, ...] = ()
    recompute_layers: int = 0  # of the average batch
    recompute_layers_longest: int = 0  # of the longest batch
    n_layers: int = 0  # that could be recomputed
    lean: tuple[str, ...] = ()  # memory savers that the longest batch needs besides
    host_bytes: int = 0  # kept on the host by them
    rungs: tuple[LevelPlan, ...] = ()  # every memory saver level; only on request
    micro_batch: int = 0  # rows that go through the model at a time
    eval_batch: int = 0  # rows that are evaluated at a time
    flops_per_step: int = 0
    step_seconds: float | None = None
    total_seconds: float | None = None
    trainable_parameters: int = 0
    total_parameters: int = 0
    cheapest_changes: tuple[Change, ...] = ()
    largest_length: int | None = None  # tokens; only on request
    largest_model: tuple[str, int] | None = None  # known shape and its peak in bytes; only on request
    step_memory: StepMemory | None = None
    step_rule: str = ""  # where rows_per_step comes from, in words
    saving_rule: str = ""  # when checkpoints are written, in words
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all phases."""
        return max((phase.peak_bytes for phase in self.phases), default=0)

    def predicted_bytes(self, phase: str) -> int | None:
        """The bytes that should be measured in a phase of the run (`load`, `train`, ...); None if not predicted.

        On a CPU this is resident memory, on a GPU live tensors without context and allocator.
        """
        on_cpu = self.device.get("backend") == "cpu"
        found = [p.peak_bytes if on_cpu else p.live_bytes for p in self.phases if p.name in _PHASES.get(phase, ())]
        return max(found, default=None)

    def lines(self) -> tuple[str, ...]:
        """The plan in a few lines."""
        worst = max(self.phases, key=lambda phase: phase.peak_bytes)
        parts = sorted(worst.parts.items(), key=lambda item: -item[1])
        verdict = "fits" if self.fits else "does not fit"
        rate = self.flops_per_step / (self.step_seconds or 1.0)
        estimate = ", an estimate" if self.device.get("is_estimate") else ""
        recomputed = f"{self.recompute_layers} of {self.n_layers} layers recomputed"
        if self.recompute_layers_longest != self.recompute_layers:
            recomputed += f" ({self.recompute_layers_longest} in the longest batch)"
        further = f"; lean: {', '.join(self.lean)}" if self.lean else ""
        further += f"; {format_bytes(self.host_bytes)} wait on the host" if self.host_bytes else ""
        return (
            f"{verdict}: {format_bytes(worst.peak_bytes)} of {format_bytes(self.budget_bytes)} on "
            f"{self.device['name']}, highest in: {worst.name}",
            f"of it {', '.join(f'{name} {format_bytes(n)}' for name, n in parts[:4])}",
            f"{self.micro_batch} rows at a time, {recomputed}{further}; {self.flops_per_step / 1e12:.3g} TFLOP a step, "
            f"{format_seconds(self.step_seconds)} at {rate / 1e12:.3g} TFLOP/s{estimate}",
            *(rule for rule in (self.step_rule, self.saving_rule) if rule),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the table that training reads."""
        content = asdict(self)
        del content["step_memory"]
        return content


# Phases of a run -> those of the plan.
_PHASES = {
    "load": ("load",),
    "reference": ("reference",),
    "train": ("first step", "steady step", "longest batch"),
    "evaluate_base": ("evaluation",),
    "evaluate": ("evaluation",),
    "save": ("checkpoint",),
}


def refusal(plan: Plan) -> CannotRunError:
    """The error that a plan which does not fit ends in, with the cheapest changes that make it fit."""
    worst = max(plan.phases, key=lambda phase: phase.peak_bytes)
    ways = [f"--{c.setting} {c.value} ({format_bytes(c.peak_bytes)})" for c in plan.cheapest_changes if c.fits]
    way = f"use {' or '.join(ways[:3])}" if ways else "no single change is enough"
    return CannotRunError(
        f"{worst.name} takes {format_bytes(worst.peak_bytes)} of {format_bytes(plan.budget_bytes)} on "
        f"{plan.device['name']}; {way}, or --force to try"
    )
