"""The evidence that symptoms are looked for in, and the results: symptom, cause, one command, and a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nybble.diagnostics.machine import AmdGpu, Machine

NO_AMD_GPU = "there is no AMD GPU"


@dataclass(frozen=True)
class TorchFacts:
    """What torch reports about itself and its devices, collected in a child process: a broken driver may hang."""

    version: str
    hip: str | None = None
    rocm: str | None = None
    cuda: str | None = None
    sees_gpu: bool = False
    devices: tuple[Mapping[str, Any], ...] = ()  # name, gfx, total_bytes, free_bytes, threads_in_wave, n_cores
    architectures: tuple[str, ...] = ()  # architectures that torch's kernels were compiled for
    hip_libraries: tuple[str, ...] = ()  # copies of libamdhip64 that are loaded in the process
    triton: str | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TorchFacts:
        """Build the facts from parsed JSON; lists become tuples."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**values)


@dataclass(frozen=True)
class Evidence:
    """A machine, what torch reports about it, and the optimizer that a run would use."""

    machine: Machine
    torch: TorchFacts | None = None  # None if torch was not asked or did not answer
    optim: str = ""  # the run's optimizer, by its name in transformers; "" if there is no run

    @property
    def gpus(self) -> tuple[AmdGpu, ...]:
        """The AMD GPUs that the kernel driver reports."""
        return self.machine.amd_gpus

    @property
    def gfx(self) -> frozenset[str]:
        """The architecture in use, as a set of at most one.

        It is that of the first visible card according to the driver, or else according to torch.
        """
        visible = [self.gpus[i] for i in self.machine.visible_gpus]
        from_driver = [gpu.gfx for gpu in visible if not gpu.is_apu] or [gpu.gfx for gpu in visible]
        from_torch = [str(device["gfx"]) for device in self.torch.devices if device.get("gfx")] if self.torch else []
        return frozenset((from_driver or from_torch)[:1])

    @property
    def is_amd(self) -> bool:
        """Whether an AMD card is plugged in or torch was built for ROCm."""
        build = self.machine.torch
        return self.machine.has_amd_card or bool(build and build.is_rocm)


@dataclass(frozen=True)
class Fault:
    """A problem that was detected."""

    cause: str
    fix: str  # one command


@dataclass(frozen=True)
class Symptom:
    """One known failure and how to detect it."""

    name: str
    symptom: str  # what the user notices
    thread: str  # the discussion that describes it, "" if there is none
    find: Callable[[Evidence], Fault | None]
    skip: Callable[[Evidence], str | None] = field(default=lambda seen: None if seen.is_amd else NO_AMD_GPU)


@dataclass(frozen=True)
class Result:
    """One row of the doctor's table; only checks that compute something have an error and a tolerance."""

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
        """This result as a failure with these explanations."""
        return replace(self, ok=False, symptom=symptom, cause=cause, fix=fix, thread=thread)


def examine(symptoms: Sequence[Symptom], evidence: Evidence) -> tuple[list[Result], dict[str, str]]:
    """The results of all symptoms that apply to this machine, and symptom -> why it was skipped for the others."""
    results = []
    not_run = {}
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
