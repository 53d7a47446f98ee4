"""What device is here.

A process computes on one device, however many it sees: that which is asked for by its number, else torch's current one.
AMD cards answer to torch's `cuda` device type; `torch.version.hip` tells them apart. On a CPU the memory that counts is
the resident memory of this process: Linux keeps its high-water mark (`VmHWM`) and resets it on request
(proc(5), `/proc/PID/clear_refs`, value 5), so that each phase has a peak of its own.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import CannotRunError
from nybble.units import format_bytes

if TYPE_CHECKING:
    import torch

# A C++ library that is refused addresses may crash without a word (torch starts threads in a backward pass), and a
# training of a model of 260K weights takes 1.9 GB of them (2 cores): code, arenas of threads, what oneDNN compiles.
_ADDRESSES = 2 << 30
_ADDRESSES_OF_THREAD = 128 << 20
# What torch's allocator, oneDNN, Python and C++ say when memory or addresses run out.
_NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|bad_alloc|can't start new thread|"
    "could not (create|execute) a primitive|could not create a (memory|stream|engine)|"
    # Libraries of GPUs that allocate beside torch: cuBLAS, hipBLAS, cuDNN; rocBLAS, MIOpen; the runtimes' own names.
    "STATUS_ALLOC_FAILED|status_?memory_?error|error(OutOfMemory|MemoryAllocation)",
    re.IGNORECASE,
)
# The part of the free memory that a training takes: a GPU's allocator leaves gaps between its blocks, and a machine
# whose GPU maps the host's memory freezes where another one raises an error.
_USABLE, _USABLE_OF_APU = 0.95, 0.80
NO_BFLOAT16 = ("gfx900", "gfx906", "gfx908", "gfx10")  # gfx908 has it, at a fraction of its float16


@dataclass(frozen=True)
class Device:
    """One device as it is now."""

    type: str  # torch's device type: "cpu" or "cuda"
    backend: str  # "cpu", "hip" or "cuda"
    name: str
    total_bytes: int
    n_cores: int
    has_bfloat16: bool  # hardware or library support worth using
    index: int = 0  # among the GPUs that this process sees
    n_visible: int = 1  # of those

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cuda", self.index) if self.type == "cuda" else torch.device("cpu")

    @property
    def usable_share(self) -> float:
        """The part of its free memory that a training may take."""
        return _USABLE_OF_APU if self.type == "cuda" and self.shares_memory else _USABLE

    @property
    def shares_memory(self) -> bool:
        """Whether its memory is the host's, as a CPU's or an APU's."""
        import torch

        if self.type == "cpu":
            return True
        return bool(getattr(torch.cuda.get_device_properties(self.torch_device), "is_integrated", False))

    @property
    def among_others(self) -> str | None:
        """Which of several visible GPUs this is, for people; None if it is the only one."""
        if self.n_visible < 2:
            return None
        return (
            f"{self.n_visible} GPUs are visible and one process uses one: cuda:{self.index}, {self.name}; choose by "
            f"--device cuda:N or {_visible(self.backend)}, or use several (docs/guide/distributed.md)"
        )


def detect_device(wanted: str = "auto") -> Device:
    """The device that `wanted` ("auto", "cpu", "cuda", "hip", or "cuda:1" and so on) names.

    A GPU that is named by its number becomes torch's current device: libraries put there what they are not told a place
    for.

    Raises:
        CannotRunError: a GPU is asked for that torch does not see, or a limit leaves a CPU too few addresses.
    """
    import torch

    number = wanted.partition(":")[2]
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        device = _cpu()
        _check_addresses(device.n_cores)
        return device
    backend = "hip" if torch.version.hip else "cuda"
    if not torch.cuda.is_available():
        build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none (CPU build)'}"
        raise CannotRunError(
            f"device {wanted!r}: torch {torch.__version__} (built for {build}) sees no GPU{_hiding(backend)}; "
            "use --device cpu, or install the torch build that matches your driver"
        )
    n_visible = torch.cuda.device_count()
    if number and int(number) >= n_visible:
        seen = "1 GPU, cuda:0" if n_visible == 1 else f"{n_visible} GPUs, cuda:0 to cuda:{n_visible - 1}"
        raise CannotRunError(
            f"device {wanted!r} is not there: torch sees {seen}{_hiding(backend)}; use one of those numbers"
        )
    if number:
        torch.cuda.set_device(int(number))
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    return Device(
        type="cuda",
        backend=backend,
        name=properties.name,
        total_bytes=properties.total_memory,
        n_cores=properties.multi_processor_count,
        has_bfloat16=_has_bfloat16(properties),
        index=index,
        n_visible=n_visible,
    )


def _visible(backend: str) -> str:
    """The variable by which a user says which GPUs a process sees."""
    return "HIP_VISIBLE_DEVICES" if backend == "hip" else "CUDA_VISIBLE_DEVICES"


def _hiding(backend: str) -> str:
    """In words, what may hide GPUs from torch; ROCm reads all three variables."""
    names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if backend == "hip" else ()
    said = [f"{name}={os.environ[name]}" for name in (*names, "CUDA_VISIBLE_DEVICES") if name in os.environ]
    return f" ({', '.join(said)})" if said else ""


def _has_bfloat16(properties: Any) -> bool:
    """torch says yes for every AMD GPU, and for old NVIDIA ones that emulate it."""
    import torch

    if torch.version.hip:
        return not str(properties.gcnArchName).startswith(NO_BFLOAT16)
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu() -> Device:
    import psutil

    return Device(
        type="cpu",
        backend="cpu",
        name=_cpu_name(),
        total_bytes=psutil.virtual_memory().total,
        n_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        has_bfloat16=True,
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_bytes(device: torch.device) -> int:
    """Bytes that a training step may still take on `device`."""
    if device.type == "cuda":
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(min(psutil.virtual_memory().available, free_addresses()))


def free_addresses() -> int:
    """Bytes of addresses that this process may still take: what `ulimit -v` has left, or 1 << 62 without a limit."""
    if sys.platform == "win32":
        return 1 << 62
    import resource

    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return 1 << 62
    import psutil

    return int(limit - psutil.Process().memory_info().vms)


def _check_addresses(n_threads: int) -> None:
    free, needed = free_addresses(), _ADDRESSES + n_threads * _ADDRESSES_OF_THREAD
    if free < needed:
        raise CannotRunError(
            f"a limit (ulimit -v) leaves {format_bytes(free)} of addresses, and libraries crash with less than "
            f"{format_bytes(needed)}; remove it (ulimit -v unlimited) and limit memory with --memory_budget or a cgroup"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a GPU torch has an error for it, on a CPU each library has words of its own."""
    is_torchs = type(error).__name__ == "OutOfMemoryError"  # by name: whoever asks may not have imported torch
    said = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return is_torchs or said or isinstance(error, MemoryError)


def used_bytes(device: torch.device) -> int:
    """Bytes that this process takes of `device` now."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Peak memory of one device since the last `reset`.

    On a GPU: bytes of live tensors (`max_memory_allocated`). On a CPU: resident bytes of this process.
    """

    def __init__(self, device: Device) -> None:
        self._gpu = device.torch_device if device.type == "cuda" else None
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._gpu is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._gpu)
        else:
            _reset_resident_peak()

    def peak_bytes(self) -> int:
        """Highest use since `reset`, in bytes."""
        if self._gpu is not None:
            import torch

            return int(torch.cuda.max_memory_allocated(self._gpu))
        return _resident_peak_bytes()


def reserved_bytes(device: Device) -> int | None:
    """The most that torch's allocator has taken of a GPU since the last reset, live or not; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_reserved(device.torch_device))


def _reset_resident_peak() -> None:
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists() and os.access(clear_refs, os.W_OK):
        clear_refs.write_text("5")


def _resident_peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # macOS and kernels without /proc: the peak of the process's life

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
