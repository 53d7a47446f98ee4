"""What a symptom is judged by, and what a judgement says: symptom, cause, one command, the thread it is known from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nybble.diagnostics.machine import AmdGpu, Machine


@dataclass(frozen=True)
class TorchFacts:
    """What torch says of itself and its devices; told by a child process, since asking a broken driver may hang."""

    version: str
    hip: str | None = None
    rocm: str | None = None
    cuda: str | None = None
    sees_gpu: bool = False
    devices: tuple[Mapping[str, Any], ...] = ()  # name, gfx, total_bytes, free_bytes, threads_in_wave, n_cores
    architectures: tuple[str, ...] = ()  # that its kernels were compiled for
    hip_libraries: tuple[str, ...] = ()  # copies of libamdhip64 in the process
    triton: str | None = None

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> TorchFacts:
        """Lists become tuples."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
        return cls(**values)


@dataclass(frozen=True)
class Evidence:
    """A machine, what torch sees of it, and what a run would ask of it."""

    machine: Machine
    torch: TorchFacts | None = None  # None: not asked, or it gave no answer
    optim: str = ""  # optimizer of the run, by its transformers name

    @property
    def gpus(self) -> tuple[AmdGpu, ...]:
        """The driver's."""
        return self.machine.amd_gpus

    @property
    def gfx(self) -> frozenset[str]:
        """The architecture in use: of the first visible card as the driver has it, else as torch has it; or none."""
        visible = [self.gpus[i] for i in self.machine.visible_gpus]
        cards = [gpu.gfx for gpu in visible if not gpu.is_apu] or [gpu.gfx for gpu in visible]
        told = [str(device["gfx"]) for device in self.torch.devices if device.get("gfx")] if self.torch else []
        return frozenset((cards or told)[:1])

    @property
    def is_amd(self) -> bool:
        """Whether AMD's side of things matters here."""
        build = self.machine.torch
        return self.machine.has_amd_card or bool(build and build.is_rocm)


@dataclass(frozen=True)
class Fault:
    """Something found."""

    cause: str
    fix: str  # one command


@dataclass(frozen=True)
class Symptom:
    """One known way to fail."""

    name: str
    symptom: str  # what the user meets
    thread: str  # where it is known from; "" where no thread tells of it
    find: Callable[[Evidence], Fault | None]
    skip: Callable[[Evidence], str | None] = field(default=lambda seen: None if seen.is_amd else "no AMD GPU is here")


@dataclass(frozen=True)
class Result:
    """A row of the doctor's table; a check that computed something has error and tolerance."""

    name: str
    ok: bool
    path: str = ""
    max_error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0
    symptom: str = ""
    cause: str = ""
    fix: str = ""
    thread: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    operator: str = ""

    def failed(self, symptom: str, cause: str, fix: str, thread: str) -> Result:
        """The same as a failure."""
        return replace(self, ok=False, symptom=symptom, cause=cause, fix=fix, thread=thread)


def examine(symptoms: Sequence[Symptom], evidence: Evidence) -> tuple[list[Result], dict[str, str]]:
    """Results of the symptoms that can be looked for here, and why others cannot."""
    results, not_run = [], {}
    for symptom in symptoms:
        why_not = symptom.skip(evidence)
        if why_not:
            not_run[symptom.name] = why_not
            continue
        fault = symptom.find(evidence)
        result = Result(symptom.name, True)
        if fault:
            result = result.failed(symptom.symptom, fault.cause, fault.fix, symptom.thread)
        results.append(result)
    return results, not_run
