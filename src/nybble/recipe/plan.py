"""The plan: what the run will do and take, settled before any weight is read. Made by `nybble.planning`."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Any

from nybble.errors import CannotRunError, RecipeError
from nybble.recipe.schema import TrainingSection
from nybble.units import format_bytes, format_seconds


@dataclass(frozen=True)
class PhasePlan:
    """What a phase takes at its highest moment."""

    name: str
    peak_bytes: int
    parts: dict[str, int]  # weights, adapters, gradients, ..., adding up to the peak

    @property
    def live_bytes(self) -> int:
        """Of tensors alone."""
        return self.peak_bytes - self.parts.get("context", 0) - self.parts.get("allocator", 0)


@dataclass(frozen=True)
class StepMemory:
    """Peak of a training step by its tokens and by the level of what is done to make it small.

    Level 0 .. n is so many of the n layers recomputed; each level of `lean` recomputes all and takes rungs besides
    (`nybble.models.lean`).
    """

    tokens: tuple[int, ...]  # of the batches that were looked at, ascending
    peaks: tuple[tuple[int, ...], ...]  # bytes for each of them, by level
    base_bytes: int  # of it, what is alive before training: weights and adapters
    lean: tuple[tuple[str, ...], ...] = ()
    rungs: tuple[str, ...] = ()  # taken at every level

    @property
    def n_levels(self) -> int:
        """Levels, from 0 on."""
        return len(self.peaks[0])

    def rungs_at(self, level: int) -> tuple[str, ...]:
        """Rungs that a level takes."""
        beyond = level - (self.n_levels - len(self.lean))
        return (*self.rungs, *(self.lean[beyond] if beyond >= 0 else ()))

    def above_base(self, n_tokens: int, level: int) -> int:
        """Bytes above weights and adapters.

        The peak is the largest of several linear functions of the tokens, so a straight line between two batches lies
        on or above it; beyond the last batch the last line goes on.
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
        """The first level at which a batch stays within the room; the last if it does at none."""
        last = self.n_levels - 1
        fits = (level for level in range(last) if self.above_base(n_tokens, level) <= room_bytes)
        return next(fits, last)


@dataclass(frozen=True)
class RungPlan:
    """What the longest batch takes with a rung and all before it (`nybble.models.lean`)."""

    name: str
    peak_bytes: int
    live_bytes: int  # of it, tensors
    host_bytes: int  # waiting on the host
    taken: bool


@dataclass(frozen=True)
class Change:
    """A change of settings that would make a run fit, and what it would take then."""

    setting: str
    value: str
    peak_bytes: int
    fits: bool
    meaning: str  # what it costs, in words


@dataclass(frozen=True)
class Plan:
    """Sizes of the run that follow from recipe, model and rows."""

    rows: int
    rows_per_step: int
    optimizer_steps: int
    gradient_checkpointing: str  # auto, never or always
    device: dict[str, Any] = field(default_factory=dict)  # name, rates, and whether they are estimates
    budget_bytes: int | None = None
    fits: bool = True
    phases: tuple[PhasePlan, ...] = ()
    recompute_layers: int = 0  # of the average batch
    recompute_layers_longest: int = 0  # of the longest batch
    n_layers: int = 0  # that could be recomputed
    lean: tuple[str, ...] = ()  # rungs beyond, that the longest batch takes
    host_bytes: int = 0  # what then waits on the host
    rungs: tuple[RungPlan, ...] = ()  # where asked for
    micro_batch: int = 0  # rows that go through the model at a time
    eval_batch: int = 0  # rows that are evaluated at a time
    flops_per_step: int = 0
    step_seconds: float | None = None
    total_seconds: float | None = None
    trainable_parameters: int = 0
    total_parameters: int = 0
    cheapest_changes: tuple[Change, ...] = ()
    largest_length: int | None = None  # tokens; where asked for
    largest_model: tuple[str, int] | None = None  # known shape and its peak in bytes; where asked for
    step_memory: StepMemory | None = None
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The highest moment of all phases."""
        return max((phase.peak_bytes for phase in self.phases), default=0)

    def predicted_bytes(self, phase: str) -> int | None:
        """What the meter of a phase of the run (`load`, `train`, `evaluate`, ...) should show; None: not predicted.

        On a CPU that is resident memory, on a GPU that of live tensors, without context and allocator.
        """
        on_cpu = self.device.get("backend") == "cpu"
        found = [p.peak_bytes if on_cpu else p.live_bytes for p in self.phases if p.name in _PHASES.get(phase, ())]
        return max(found, default=None)

    def lines(self) -> tuple[str, str, str]:
        """The plan in three lines."""
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
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the table for the training."""
        content = asdict(self)
        del content["step_memory"]
        return content


# Phases of a run -> those of the plan.
_PHASES = {
    "load": ("load",),
    "train": ("first step", "steady step", "longest batch"),
    "evaluate_base": ("evaluation",),
    "evaluate": ("evaluation",),
    "save": ("checkpoint",),
}


def in_micro_batches(training: TrainingSection, size: int) -> TrainingSection:
    """The same steps, `size` rows going through the model at a time; a size that divides the batch."""
    n_parts = training.per_device_train_batch_size // size
    accumulated = training.gradient_accumulation_steps * n_parts
    return training.model_copy(
        update={"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated} if n_parts > 1 else {}
    )


def shared_among(training: TrainingSection, n_processes: int) -> TrainingSection:
    """One process's share of the same steps, in micro-batches as large as divide it.

    Raises:
        RecipeError: the rows of a step cannot be shared evenly.
    """
    most, n_rows = training.per_device_train_batch_size, step_rows(training)
    share, rest = divmod(n_rows, n_processes)
    if rest:
        raise RecipeError(
            f"the {n_rows} rows of a step (per_device_train_batch_size {most} x gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps}) cannot be shared by {n_processes} processes; make their product "
            f"a multiple of {n_processes}, or start another number of processes"
        )
    size = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
    return training.model_copy(
        update={"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
    )


def step_rows(training: TrainingSection) -> int:
    """Rows of an optimizer step, over all micro-batches and processes."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


def refusal(plan: Plan) -> CannotRunError:
    """Why a run will not be started, with the cheapest ways out."""
    worst = max(plan.phases, key=lambda phase: phase.peak_bytes)
    ways = [f"--{c.setting} {c.value} ({format_bytes(c.peak_bytes)})" for c in plan.cheapest_changes if c.fits]
    way = f"use {' or '.join(ways[:3])}" if ways else "no single change is enough"
    return CannotRunError(
        f"{worst.name} takes {format_bytes(worst.peak_bytes)} of {format_bytes(plan.budget_bytes)} on "
        f"{plan.device['name']}; {way}, or --force to try"
    )
