"""Facts about this machine that need no torch: the kernel driver's files, device nodes, variables, installed wheels.

The AMD driver's own data (`/sys/class/kfd`) is not affected by `HSA_OVERRIDE_GFX_VERSION`, which changes only what user
space sees. Everything is read below `root`, so that tests can describe other machines by a directory tree.
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
# Each selects among the GPUs that the previous one left; HIP's own variable wins over the one that it shares with CUDA.
VISIBLE_DEVICES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_AMD, _NVIDIA = "0x1002", "0x10de"
_KMSG_BYTES = 1 << 22


@dataclass(frozen=True)
class AmdGpu:
    """One GPU as the kernel driver reports it."""

    gfx: str  # "gfx1100"
    render_node: str  # "renderD128"
    total_bytes: int  # size of its own memory
    used_bytes: int
    shared_total_bytes: int  # host memory that it may map (GTT)
    partition: str  # the compute partition: "SPX" if the card is whole, "" if it cannot be split
    link_width: tuple[int, int] | None  # current and maximal number of PCIe lanes
    uncorrectable_errors: int
    celsius: float | None
    critical_celsius: float | None

    @property
    def is_apu(self) -> bool:
        """Whether the GPU shares the CPU's memory."""
        return self.gfx.startswith(APUS)


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for, read from its files."""

    version: str
    hip: str | None
    rocm: str | None
    cuda: str | None

    @property
    def is_rocm(self) -> bool:
        """Whether torch was built for ROCm; some wheels for Radeon say so only in the version."""
        return bool(self.hip or self.rocm or "+rocm" in self.version)

    @property
    def rocm_version(self) -> tuple[int, ...]:
        """The version of ROCm, for example (7, 2); empty if unknown. ROCm 10.0 has HIP 7.15, so `rocm` comes first."""
        local_tag = re.sub(r".*\+rocm", "", self.version) if "+rocm" in self.version else ""
        text = self.rocm or local_tag or self.hip or ""
        if not self.rocm and text.startswith("7.15"):
            return (10, 0)
        return version_tuple(text)[:2]

    @property
    def description(self) -> str:
        """The build as messages name it, for example `torch 2.13.0+cpu (CPU build)`."""
        kind = f"ROCm {self.rocm or self.hip or '?'}" if self.is_rocm else f"CUDA {self.cuda}" if self.cuda else "CPU"
        return f"torch {self.version} ({kind} build)"


@dataclass(frozen=True)
class Machine:
    """A machine, whose files are read on access."""

    root: Path
    environ: Mapping[str, str]
    packages: Mapping[str, str]  # distribution -> version
    torch: TorchBuild | None
    system: str = "Linux"  # platform.system()
    can_open: Callable[[Path], bool] = field(default=lambda path: os.access(path, os.R_OK | os.W_OK))
    has_compiler: bool = True  # a C compiler and Python's headers; Triton's launcher needs both on first use

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Machine:
        """The machine that this process runs on."""
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
        """The content of a small file below the root; "" if it does not exist or may not be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def number(self, path: str) -> int:
        """The first integer in a file; 0 if there is none."""
        match = re.search(r"\d+", self.text(path))
        return int(match[0]) if match else 0

    @property
    def kernel(self) -> str:
        """The release of the kernel, for example "6.18.4-arch1"."""
        return self.text("proc/sys/kernel/osrelease")

    @property
    def is_wsl(self) -> bool:
        """Whether this is the Windows Subsystem for Linux."""
        return "microsoft" in self.kernel.lower()

    @property
    def is_container(self) -> bool:
        """Whether this is a container of Docker or Podman."""
        return any((self.root / name).exists() for name in (".dockerenv", "run/.containerenv"))

    @property
    def memory_bytes(self) -> int:
        """The size of the host's memory."""
        return self._memory("MemTotal")

    @property
    def memory_free_bytes(self) -> int:
        """The host memory that programs can still allocate."""
        return self._memory("MemAvailable")

    def _memory(self, name: str) -> int:
        match = re.search(rf"{name}:\s+(\d+) kB", self.text("proc/meminfo"))
        return int(match[1]) * 1024 if match else 0

    @cached_property
    def amd_gpus(self) -> tuple[AmdGpu, ...]:
        """The GPUs that the driver reports, in ROCm's order."""
        files = (self.root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
        nodes = [_properties(self.text(str(f.relative_to(self.root)))) for f in sorted(files, key=_node_number)]
        return tuple(self._gpu(node) for node in nodes if node.get("simd_count") and node.get("gfx_target_version"))

    @property
    def visible_gpus(self) -> list[int]:
        """Indices of the AMD GPUs that the environment variables leave visible, in torch's order."""
        visible = list(range(len(self.amd_gpus)))
        for name in VISIBLE_DEVICES:
            wanted = self.environ.get(name)
            if wanted is None or (name == "CUDA_VISIBLE_DEVICES" and "HIP_VISIBLE_DEVICES" in self.environ):
                continue
            parts = [part.strip() for part in wanted.split(",") if part.strip()]
            if all(part.isdigit() for part in parts):  # UUIDs are ignored
                visible = [visible[int(part)] for part in parts if int(part) < len(visible)]
        return visible

    @cached_property
    def has_amd_card(self) -> bool:
        """Whether an AMD card is plugged in, with or without a driver."""
        return bool(self.amd_gpus) or self._has_card(_AMD)

    @cached_property
    def has_nvidia_card(self) -> bool:
        """Whether an NVIDIA card is plugged in, with or without a driver."""
        return (self.root / "proc/driver/nvidia/version").exists() or self._has_card(_NVIDIA)

    @property
    def driver(self) -> str:
        """The version of the GPU's kernel driver; the in-tree amdgpu has the version of the kernel. "" if unknown."""
        nvidia = re.search(r"Kernel Module\D*([\d.]+)", self.text("proc/driver/nvidia/version"))
        if nvidia:
            return f"nvidia {nvidia[1]}"
        if (self.root / "sys/module/amdgpu").is_dir():
            return f"amdgpu {self.text('sys/module/amdgpu/version') or self.kernel}"
        return ""

    def holders(self) -> dict[int, int]:
        """Other processes that use memory of an AMD GPU: process id -> bytes."""
        bytes_of: dict[int, int] = {}
        for file in (self.root / "sys/class/kfd/kfd/proc").glob("*/vram_*"):
            n_bytes = self.number(str(file.relative_to(self.root)))
            if n_bytes and file.parent.name != str(os.getpid()):
                process = int(file.parent.name)
                bytes_of[process] = bytes_of.get(process, 0) + n_bytes
        return bytes_of

    def kernel_messages(self) -> str:
        """The kernel's log since the machine started; "" if this user may not read it."""
        try:
            handle = os.open(self.root / "dev/kmsg", os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            return ""
        lines = b""
        try:
            while len(lines) < _KMSG_BYTES and (more := os.read(handle, 8192)):
                lines += more
        except OSError:  # the end of the log
            return lines.decode(errors="replace")
        finally:
            os.close(handle)
        return lines.decode(errors="replace")

    def package(self, *names: str) -> tuple[int, ...] | None:
        """The version of the first of these distributions that is installed; None if there is none."""
        return next((version_tuple(self.packages[name]) for name in names if name in self.packages), None)

    def _has_card(self, vendor: str) -> bool:
        for device in (self.root / "sys/bus/pci/devices").glob("*"):
            where = str(device.relative_to(self.root))
            # 0x03 is the class of display controllers, 0x12 that of processing accelerators, such as Instinct cards.
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
    """The name of a target version: 90010 -> "gfx90a".

    Major, minor and stepping have two decimal digits each; the name has the stepping in hexadecimal.
    """
    return f"gfx{target_version // 10000}{target_version // 100 % 100}{target_version % 100:x}"


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "7.2.1+gfx" -> (7, 2, 1).

    pip's own order would be wrong here because it compares the local tags of wheels as text.
    """
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def read_torch_build() -> TorchBuild | None:
    """What the installed torch was built for, without importing it; None if torch is not installed."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    return parse_torch_build(file.read_text(encoding="utf-8")) if file.is_file() else None


def parse_torch_build(text: str) -> TorchBuild | None:
    """Parse the text of torch/version.py; None if it names no version."""
    values = dict(re.findall(r"^(__version__|hip|rocm|cuda)\b[^=]*=\s*'([^']*)'", text, re.MULTILINE))
    if "__version__" not in values:
        return None
    return TorchBuild(values["__version__"], values.get("hip"), values.get("rocm"), values.get("cuda"))


def _properties(text: str) -> dict[str, int]:
    pairs: Iterator[list[str]] = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _node_number(path: Path) -> int:
    return int(path.parent.name) if path.parent.name.isdigit() else 0
