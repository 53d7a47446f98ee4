"""What this machine says of itself without torch: the kernel driver's files, device nodes, variables, installed wheels.

The AMD driver's own account (`/sys/class/kfd`) is immune to `HSA_OVERRIDE_GFX_VERSION`, which only lies to user space.
Everything is read below `root`, so that a made-up tree stands in for a machine that is not here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

# GPUs that share the memory of their CPU.
APUS = ("gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1037", "gfx1103", "gfx115")
# In this order each picks among what the former left; HIP's own wins over the one it shares with CUDA.
VISIBLE_DEVICES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_AMD, _NVIDIA = "0x1002", "0x10de"
_KMSG_BYTES = 1 << 22


@dataclass(frozen=True)
class AmdGpu:
    """One GPU as the kernel driver knows it."""

    gfx: str  # "gfx1100"
    render_node: str  # "renderD128"
    total_bytes: int  # of its own memory
    used_bytes: int
    shared_total_bytes: int  # host memory that it may map (GTT)
    partition: str  # "SPX", or how a card is split; "" where it cannot be
    link_width: tuple[int, int] | None  # PCIe lanes now and at most
    uncorrectable_errors: int
    celsius: float | None
    critical_celsius: float | None

    @property
    def is_apu(self) -> bool:
        """Whether it shares the CPU's memory."""
        return self.gfx.startswith(APUS)


@dataclass(frozen=True)
class TorchBuild:
    """What an installed torch was built for, read from its files."""

    version: str
    hip: str | None
    rocm: str | None
    cuda: str | None

    @property
    def is_rocm(self) -> bool:
        """Some wheels for Radeon leave `hip` unset and say it in the version alone."""
        return bool(self.hip or self.rocm or "+rocm" in self.version)

    @property
    def rocm_version(self) -> tuple[int, ...]:
        """(7, 2); empty if unknown. ROCm 10.0 calls its HIP 7.15, so `rocm` counts first."""
        told = self.rocm or re.sub(r".*\+rocm", "", self.version if "+rocm" in self.version else "") or self.hip or ""
        if not self.rocm and told.startswith("7.15"):
            return (10, 0)
        return version_tuple(told)[:2]

    @property
    def description(self) -> str:
        """`torch 2.13.0+cpu (CPU build)`."""
        kind = f"ROCm {self.rocm or self.hip or '?'}" if self.is_rocm else f"CUDA {self.cuda}" if self.cuda else "CPU"
        return f"torch {self.version} ({kind} build)"


@dataclass(frozen=True)
class Machine:
    """A machine, read when asked."""

    root: Path
    environ: Mapping[str, str]
    packages: Mapping[str, str]  # distribution -> version
    torch: TorchBuild | None
    system: str = "Linux"  # platform.system()
    can_open: Callable[[Path], bool] = field(default=lambda path: os.access(path, os.R_OK | os.W_OK))
    has_compiler: bool = True  # and Python's headers: Triton's launcher needs both on first use

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Machine:
        """This one."""
        packages = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions() if d.name}
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
        return cls(
            Path("/"),
            os.environ if environ is None else environ,
            packages,
            read_torch_build(),
            platform.system(),
            has_compiler=bool(compiler) and headers.is_file(),
        )

    def text(self, path: str) -> str:
        """Content of a small file below the root; "" if it is not there or not ours to read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def number(self, path: str) -> int:
        """The first whole number in a file; 0 without one."""
        found = re.search(r"\d+", self.text(path))
        return int(found[0]) if found else 0

    @property
    def kernel(self) -> str:
        """Release of the kernel: "6.18.4-arch1"."""
        return self.text("proc/sys/kernel/osrelease")

    @property
    def is_wsl(self) -> bool:
        """Whether this is Linux inside Windows."""
        return "microsoft" in self.kernel.lower()

    @property
    def is_container(self) -> bool:
        """Docker or Podman."""
        return any((self.root / name).exists() for name in (".dockerenv", "run/.containerenv"))

    @property
    def memory_bytes(self) -> int:
        """All of the host's memory."""
        return self._memory("MemTotal")

    @property
    def memory_free_bytes(self) -> int:
        """What of it programs may still take."""
        return self._memory("MemAvailable")

    def _memory(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", self.text("proc/meminfo"))
        return int(found[1]) * 1024 if found else 0

    @cached_property
    def amd_gpus(self) -> tuple[AmdGpu, ...]:
        """GPUs of the driver, in the order in which ROCm counts them."""
        nodes = (self.root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
        read = [_properties(self.text(str(n.relative_to(self.root)))) for n in sorted(nodes, key=_node_number)]
        return tuple(self._gpu(node) for node in read if node.get("simd_count") and node.get("gfx_target_version"))

    @property
    def visible_gpus(self) -> list[int]:
        """Numbers of the AMD GPUs that the variables leave, in torch's order."""
        left = list(range(len(self.amd_gpus)))
        for name in VISIBLE_DEVICES:
            wanted = self.environ.get(name)
            if wanted is None or (name == "CUDA_VISIBLE_DEVICES" and "HIP_VISIBLE_DEVICES" in self.environ):
                continue
            parts = [part.strip() for part in wanted.split(",") if part.strip()]
            if all(part.isdigit() for part in parts):  # identifiers are not ours to resolve
                left = [left[int(part)] for part in parts if int(part) < len(left)]
        return left

    @cached_property
    def has_amd_card(self) -> bool:
        """Whether one is plugged in, driver or not."""
        return bool(self.amd_gpus) or self._has_card(_AMD)

    @cached_property
    def has_nvidia_card(self) -> bool:
        """Whether one is plugged in, driver or not."""
        return (self.root / "proc/driver/nvidia/version").exists() or self._has_card(_NVIDIA)

    @property
    def driver(self) -> str:
        """Version of the GPU's kernel driver; amdgpu in the kernel's own tree goes by the kernel's release."""
        nvidia = re.search(r"Kernel Module\D*([\d.]+)", self.text("proc/driver/nvidia/version"))
        if nvidia:
            return f"nvidia {nvidia[1]}"
        if (self.root / "sys/module/amdgpu").is_dir():
            return f"amdgpu {self.text('sys/module/amdgpu/version') or self.kernel}"
        return ""

    def holders(self) -> dict[int, int]:
        """Other processes with memory on an AMD GPU: number -> bytes."""
        found: dict[int, int] = {}
        for file in (self.root / "sys/class/kfd/kfd/proc").glob("*/vram_*"):
            held = self.number(str(file.relative_to(self.root)))
            if held and file.parent.name != str(os.getpid()):
                found[int(file.parent.name)] = found.get(int(file.parent.name), 0) + held
        return found

    def kernel_messages(self) -> str:
        """The kernel's log since the start, as far as we may read it."""
        try:
            handle = os.open(self.root / "dev/kmsg", os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            return ""
        lines = b""
        try:
            while len(lines) < _KMSG_BYTES and (more := os.read(handle, 8192)):
                lines += more
        except OSError:  # the end of what has been logged
            return lines.decode(errors="replace")
        finally:
            os.close(handle)
        return lines.decode(errors="replace")

    def package(self, *names: str) -> tuple[int, ...] | None:
        """Version of the first of these distributions that is installed."""
        return next((version_tuple(self.packages[name]) for name in names if name in self.packages), None)

    def _has_card(self, vendor: str) -> bool:
        for device in (self.root / "sys/bus/pci/devices").glob("*"):
            where = str(device.relative_to(self.root))
            # 0x03: display controllers; 0x12: processing accelerators, as Instinct cards call themselves
            if self.text(f"{where}/vendor") == vendor and self.text(f"{where}/class")[:4] in ("0x03", "0x12"):
                return True
        return False

    def _gpu(self, node: Mapping[str, int]) -> AmdGpu:
        render = f"renderD{node.get('drm_render_minor', 0)}"
        where = f"sys/class/drm/{render}/device"
        width = self.number(f"{where}/current_link_width"), self.number(f"{where}/max_link_width")
        errors = re.search(r"ue:\s*(\d+)", self.text(f"{where}/ras/umc_err_count"))
        heat = next((self.root / where).glob("hwmon/*/temp2_input"), None)
        sensor = str(heat.relative_to(self.root)).removesuffix("input") if heat else ""
        return AmdGpu(
            gfx=gfx_name(node["gfx_target_version"]),
            render_node=render,
            total_bytes=self.number(f"{where}/mem_info_vram_total"),
            used_bytes=self.number(f"{where}/mem_info_vram_used"),
            shared_total_bytes=self.number(f"{where}/mem_info_gtt_total"),
            partition=self.text(f"{where}/current_compute_partition"),
            link_width=width if all(width) else None,
            uncorrectable_errors=int(errors[1]) if errors else 0,
            celsius=self.number(f"{sensor}input") / 1000 if sensor else None,
            critical_celsius=self.number(f"{sensor}crit") / 1000 or None if sensor else None,
        )


def gfx_name(target_version: int) -> str:
    """90010 -> "gfx90a": major, minor, stepping in two decimal digits each, the stepping written in hexadecimal."""
    return f"gfx{target_version // 10000}{target_version // 100 % 100}{target_version % 100:x}"


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers: "7.2.1+gfx" -> (7, 2, 1). Local tags of wheels compare as text, so pip's order is wrong."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def read_torch_build() -> TorchBuild | None:
    """What the installed torch was built for, without importing it; None if there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    return parse_torch_build(file.read_text(encoding="utf-8")) if file.is_file() else None


def parse_torch_build(text: str) -> TorchBuild | None:
    """torch/version.py as a `TorchBuild`."""
    told = dict(re.findall(r"^(__version__|hip|rocm|cuda)\b[^=]*=\s*'([^']*)'", text, re.MULTILINE))
    if "__version__" not in told:
        return None
    return TorchBuild(told["__version__"], told.get("hip"), told.get("rocm"), told.get("cuda"))


def _properties(text: str) -> dict[str, int]:
    pairs: Iterator[list[str]] = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _node_number(path: Path) -> int:
    return int(path.parent.name) if path.parent.name.isdigit() else 0
