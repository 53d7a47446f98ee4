"""Every known failure, on a made-up machine that has it, and none on the healthy one beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nybble.diagnostics import driver, wheels
from nybble.diagnostics.evidence import Evidence, Result, TorchFacts, examine
from nybble.diagnostics.machine import Machine, TorchBuild

GB = 10**9
EVERY = (*driver.SYMPTOMS, *wheels.SYMPTOMS)
TARGETS = {
    "gfx906": 90006,
    "gfx90a": 90010,
    "gfx942": 90402,
    "gfx1030": 100300,
    "gfx1036": 100306,
    "gfx1100": 110000,
    "gfx1101": 110001,
    "gfx1151": 110501,
    "gfx1200": 120000,
}
ROCM_VERSION = {(7, 2): "7.2.26015", (7, 12): "7.12.60610", (6, 3): "6.3.42131", (10, 0): "7.15.70000"}


@dataclass
class Fake:
    """A machine to be written to disk; as it stands, a healthy one with one Radeon RX 7900."""

    gpus: tuple[str, ...] = ("gfx1100",)
    files: dict[str, str] = field(default_factory=dict)  # path -> content, over the usual ones
    without: tuple[str, ...] = ()  # paths that are not there
    environ: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    build: TorchBuild | None = field(default_factory=lambda: build_for((7, 2)))
    system: str = "Linux"
    closed: tuple[str, ...] = ()
    has_compiler: bool = True
    torch: TorchFacts | None = None
    optim: str = ""

    def evidence(self, root: Path) -> Evidence:
        for path, content in {**self.usual(), **self.files}.items():
            if not any(path.startswith(gone) for gone in self.without):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(content)
        machine = Machine(
            root,
            self.environ,
            {"torch": "2.12", **({"triton": "3.9"} if self.system == "Linux" else {}), **self.packages},
            self.build,
            self.system,
            lambda path: str(path.relative_to(root)) not in self.closed,
            self.has_compiler,
        )
        return Evidence(machine, self.torch, self.optim)

    def usual(self) -> dict[str, str]:
        kfd, files = (
            "sys/class/kfd/kfd/topology/nodes",
            {
                "dev/kfd": "",
                "proc/sys/kernel/osrelease": "6.18.9-generic\n",
                "proc/meminfo": "MemTotal:       131072000 kB\n",
                "sys/module/amdgpu/version": "6.16.6\n",
                "etc/group": f"video:x:44:\nrender:x:{os.getgid()}:\n",
                "sys/class/kfd/kfd/topology/nodes/0/properties": "simd_count 0\n",
            },
        )
        for i, gfx in enumerate(self.gpus):
            render, device = f"renderD{128 + i}", f"sys/class/drm/renderD{128 + i}/device"
            properties = (
                f"simd_count 96\ngfx_target_version {TARGETS[gfx]}\nvendor_id 4098\ndrm_render_minor {128 + i}\n"
            )
            files |= {
                f"{kfd}/{i + 1}/properties": properties,
                f"dev/dri/{render}": "",
                f"sys/bus/pci/devices/0000:0{i}:00.0/vendor": "0x1002\n",
                f"sys/bus/pci/devices/0000:0{i}:00.0/class": "0x030000\n",
                f"{device}/mem_info_vram_total": f"{24 * GB}\n",
                f"{device}/mem_info_vram_used": "20000000\n",
                f"{device}/mem_info_gtt_total": f"{96 * GB}\n",
                f"{device}/current_link_width": "16\n",
                f"{device}/max_link_width": "16\n",
                f"{device}/current_compute_partition": "SPX\n",
                f"{device}/ras/umc_err_count": "ue: 0\nce: 3\n",
                f"{device}/hwmon/hwmon4/temp2_input": "61000\n",
                f"{device}/hwmon/hwmon4/temp2_crit": "110000\n",
            }
        return files


def build_for(rocm: tuple[int, int] | None, cuda: str | None = None) -> TorchBuild:
    if rocm is None:
        return TorchBuild(f"2.12.0+cu{cuda.replace('.', '')}" if cuda else "2.12.0+cpu", None, None, cuda)
    number = f"{rocm[0]}.{rocm[1]}"
    return TorchBuild(f"2.12.0+rocm{number}", ROCM_VERSION[rocm], number, None)


def facts(**told: Any) -> TorchFacts:
    return TorchFacts(**{"version": "2.12.0+rocm7.2", "hip": "7.2", "sees_gpu": True, **told})


def found(fake: Fake, root: Path) -> dict[str, Result]:
    results, _ = examine(EVERY, fake.evidence(root))
    return {result.name: result for result in results if not result.ok}


NODE = "sys/class/drm/renderD128/device"
CASES: dict[str, tuple[str, Fake, str, str]] = {
    # what is wrong -> symptom, machine, word of the cause, word of the fix
    "module not loaded": ("driver", Fake(without=("dev/kfd", "sys/module/amdgpu")), "not loaded", "modprobe amdgpu"),
    "no compute part": ("driver", Fake(without=("dev/kfd",)), "interface /dev/kfd is missing", "modprobe -r"),
    "container without device": (
        "driver",
        Fake(without=("dev/kfd",), files={".dockerenv": ""}),
        "not in this container",
        "--device=/dev/kfd --device=/dev/dri",
    ),
    "not in the group": ("permission", Fake(closed=("dev/kfd",)), "/dev/kfd", "usermod -aG render"),
    "render node closed": ("permission", Fake(closed=("dev/dri/renderD128",)), "/dev/dri/renderD128", "usermod"),
    "group of a container": (
        "permission",
        Fake(closed=("dev/kfd",), files={"run/.containerenv": ""}),
        "/dev/kfd",
        f"--group-add {os.getgid()}",
    ),
    "spoofed": (
        "architecture",
        Fake(("gfx1151",), environ={"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}),
        "claims gfx1100, but the driver reports gfx1151",
        "unset HSA_OVERRIDE_GFX_VERSION && pip install",
    ),
    "spoof not a version": (
        "architecture",
        Fake(environ={"HSA_OVERRIDE_GFX_VERSION": "gfx1100"}),
        "'gfx1100'",
        "unset",
    ),
    "torch and driver differ": (
        "architecture",
        Fake(torch=facts(devices=({"gfx": "gfx1030"},))),
        "torch reports gfx1030, but the driver reports gfx1100",
        "unset",
    ),
    "CUDA wheel": (
        "torch build",
        Fake(build=build_for(None, "12.8")),
        "(CUDA 12.8 build) cannot use the AMD GPU (gfx1100)",
        'whl-multi-arch/ "torch[device-gfx1100]"',
    ),
    "CPU wheel on Instinct": ("torch build", Fake(("gfx90a",), build=build_for(None)), "CPU build", "whl/rocm7.2"),
    "CPU wheel beside NVIDIA": (
        "torch build",
        Fake((), build=build_for(None), files={"proc/driver/nvidia/version": "NVRM: Kernel Module  580.65  x"}),
        "cannot use the NVIDIA GPU",
        "cu128",
    ),
    "no torch": ("torch build", Fake(build=None), "not installed", "torch[device-gfx1100]"),
    "device extra forgotten": (
        "torch kernels",
        Fake(packages={"rocm-sdk-core": "7.13", "amd-torch-device-gfx1201": "2.12"}),
        "kernels for gfx1100 are not installed (installed: gfx1201)",
        "torch[device-gfx1100]",
    ),
    "old card": (
        "torch kernels",
        Fake(("gfx906",), torch=facts(architectures=("gfx90a", "gfx942"))),
        "not for gfx906",
        "whl/rocm6.3",
    ),
    "integrated GPU first": (
        "visible devices",
        Fake(("gfx1036", "gfx1200")),
        "the integrated gfx1036",
        "export HIP_VISIBLE_DEVICES=1",
    ),
    "variables compose to nothing": (
        "visible devices",
        Fake(("gfx942", "gfx942"), environ={"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}),
        "which apply one after the other, hide all 2 GPU(s)",
        "unset ROCR_VISIBLE_DEVICES",
    ),
    "no device left": (
        "visible devices",
        Fake(environ={"CUDA_VISIBLE_DEVICES": ""}),
        "hide all 1 GPU(s)",
        "HIP_VISIBLE",
    ),
    "system ROCm before the wheel's": (
        "one ROCm",
        Fake(
            environ={"LD_LIBRARY_PATH": "/opt/rocm-6.4/lib:/usr/lib"},
            files={"opt/rocm-6.4/lib/libamdhip64.so.6": ""},
        ),
        "/opt/rocm-6.4/lib",
        "LD_LIBRARY_PATH",
    ),
    "two runtimes loaded": (
        "one ROCm",
        Fake(torch=facts(hip_libraries=("/a/libamdhip64.so.6", "/b/libamdhip64.so.7"))),
        "several copies",
        "unset LD_LIBRARY_PATH",
    ),
    "old bitsandbytes": (
        "bitsandbytes build",
        Fake(packages={"bitsandbytes": "0.49.2"}),
        "0.49.2",
        'pip install -U "bitsandbytes>=0.50"',
    ),
    "bitsandbytes without this HIP": (
        "bitsandbytes build",
        Fake(packages={"bitsandbytes": "0.50.2"}, build=TorchBuild("2.15.0+rocm11.0", "8.0.1", "11.0", None)),
        "no library for HIP 8.0.1",
        "uninstall",
    ),
    "RDNA2 and Triton": ("Triton's needs", Fake(("gfx1030",)), "does not compile for gfx1030", "nybble doctor"),
    "two Tritons": (
        "Triton's needs",
        Fake(packages={"triton-rocm": "3.5"}),
        "PyPI's triton has overwritten triton-rocm",
        "pip uninstall -y triton",
    ),
    "no compiler": (
        "Triton's needs",
        Fake(has_compiler=False),
        "a C compiler or Python.h is missing",
        "apt install gcc python3-dev",
    ),
    "attention held back": (
        "flash attention",
        Fake(("gfx1101",)),
        "gfx1101 is off",
        "export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1",
    ),
    "no flash attention": ("flash attention", Fake(("gfx906",), build=build_for((6, 3))), "gfx906", "max_length"),
    "RDNA4 and hipBLASLt": ("rank-8 products", Fake(("gfx1200",)), "ROCm 7.2 reads past", "ROCBLAS_USE_HIPBLASLT=0"),
    "RDNA4 and ROCm 10, which says HIP 7.15": (
        "rank-8 products",
        Fake(("gfx1200",), build=TorchBuild("2.14.0", "7.15.70000", None, None)),
        "ROCm 10.0",
        "TORCH_BLAS_PREFER_HIPBLASLT=0",
    ),
    "paged optimizer": ("paged optimizer", Fake(optim="paged_adamw_8bit"), "paged_adamw_8bit", "adamw_torch_fused"),
    "growing segments": (
        "allocator",
        Fake(environ={"PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}),
        "PYTORCH_HIP_ALLOC_CONF",
        "unset PYTORCH_HIP_ALLOC_CONF",
    ),
    "APU with half its memory": (
        "shared memory",
        Fake(
            ("gfx1151",),
            files={f"{NODE}/mem_info_vram_total": f"{GB // 2}", f"{NODE}/mem_info_gtt_total": f"{62 * GB}"},
        ),
        "may use only 62.50 GB of 134.22 GB",
        "ttm pages_limit=24576000",
    ),
    "APU on an old kernel": (
        "shared memory",
        Fake(("gfx1151",), files={"proc/sys/kernel/osrelease": "6.17.0-5-generic"}),
        "kernel 6.17.0-5-generic",
        "full-upgrade",
    ),
    "APU with bad firmware": (
        "shared memory",
        Fake(
            ("gfx1151",), files={"var/lib/dpkg/status": "Package: linux-firmware\nStatus: ok\nVersion: 20251125-1\n\n"}
        ),
        "linux-firmware 20251125-1",
        "--only-upgrade",
    ),
    "memory held": (
        "memory held by others",
        Fake(files={"sys/class/kfd/kfd/proc/4242/vram_51": f"{9 * GB}", "proc/4242/comm": "ollama"}),
        "4242 (ollama): 9.00 GB",
        "kill 4242",
    ),
    "partitioned": ("partition", Fake(("gfx942",), files={f"{NODE}/current_compute_partition": "CPX"}), "CPX", "SPX"),
    "page fault before": (
        "faults since the start",
        Fake(files={"dev/kmsg": "6,1,2,-;x\n3,2,9,-;amdgpu 0000:03:00.0: amdgpu: [gfxhub] page fault (src_id:0)\n"}),
        "[gfxhub] page fault",
        "sudo reboot",
    ),
    "reset before": (
        "faults since the start",
        Fake(files={"dev/kmsg": "3,2,9,-;amdgpu 0000:03:00.0: amdgpu: MODE1 reset\n"}),
        "MODE1 reset",
        "sudo reboot",
    ),
    "memory errors": (
        "health of the card",
        Fake(files={f"{NODE}/ras/umc_err_count": "ue: 2\nce: 0"}),
        "2 uncorrectable memory errors",
        "",
    ),
    "narrow link": ("health of the card", Fake(files={f"{NODE}/current_link_width": "4"}), "4 of 16", "lspci"),
    "hot": ("health of the card", Fake(files={f"{NODE}/hwmon/hwmon4/temp2_input": "108000"}), "108 °C", "amd-smi"),
    "bfloat16 on an old card": ("bfloat16", Fake(("gfx906",), build=build_for((6, 3))), "gfx906", "float16"),
    "Windows without Triton": (
        "Windows",
        Fake(system="Windows", without=("dev/kfd",)),
        "no Triton",
        "triton-windows",
    ),
    "WSL without a GPU": (
        "Windows",
        Fake((), files={"proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2"}),
        "/dev/dxg",
        "wsl --update",
    ),
    "WSL and an older ROCm": (
        "Windows",
        Fake((), files={"proc/sys/kernel/osrelease": "6.6-microsoft-standard-WSL2", "dev/dxg": ""}),
        "ROCm 7.2",
        "HSA_ENABLE_DXG_DETECTION=1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failure_is_found_with_cause_fix_and_symptom(name: str, tmp_path: Path) -> None:
    symptom, fake, cause, fix = CASES[name]
    result = found(fake, tmp_path)[symptom]
    assert cause in result.cause
    assert fix in result.fix
    assert "\n" not in result.fix
    assert result.symptom


def test_every_symptom_has_a_case_and_a_name_of_its_own() -> None:
    assert len(EVERY) == len({symptom.name for symptom in EVERY}) == 20
    assert {case[0] for case in CASES.values()} == {symptom.name for symptom in EVERY}


HEALTHY: dict[str, Fake] = {
    "Radeon": Fake(torch=facts(devices=({"gfx": "gfx1100"},), architectures=("gfx1100", "gfx90a"))),
    "Instinct": Fake(("gfx942", "gfx942"), environ={"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "1"}),
    "one half of an MI250": Fake(("gfx90a", "gfx90a"), environ={"HIP_VISIBLE_DEVICES": "0"}),
    "Strix Halo": Fake(("gfx1151",), packages={"bitsandbytes": "0.50.2"}, optim="adamw_torch_fused"),
    "card beside an APU": Fake(("gfx1036", "gfx1100"), environ={"HIP_VISIBLE_DEVICES": "1"}),
    "family code": Fake(torch=facts(architectures=("gfx11-generic",))),
    "AMD's wheels": Fake(packages={"rocm-sdk-core": "7.13", "amd-torch-device-gfx1100": "2.12"}),
    "all asked for": Fake(("gfx1101",), environ={"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1"}),
    "RDNA4 on rocBLAS": Fake(
        ("gfx1200",),
        environ={
            "TORCH_BLAS_PREFER_HIPBLASLT": "0",
            "ROCBLAS_USE_HIPBLASLT": "0",
            "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1",
        },
    ),
    "WSL": Fake(
        (),
        files={"proc/sys/kernel/osrelease": "6.6-microsoft-standard-WSL2", "dev/dxg": ""},
        environ={"HSA_ENABLE_DXG_DETECTION": "1"},
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_machine_has_none(name: str, tmp_path: Path) -> None:
    assert found(HEALTHY[name], tmp_path) == {}


def test_the_family_of_rdna2_may_be_spoofed(tmp_path: Path) -> None:
    fake = Fake(("gfx1036",), environ={"HSA_OVERRIDE_GFX_VERSION": "10.3.0"})
    assert "architecture" not in found(fake, tmp_path)


def test_without_a_gpu_nothing_is_looked_for_and_it_says_so(tmp_path: Path) -> None:
    gone = ("dev", "sys")
    results, not_run = examine(EVERY, Fake((), without=gone, build=build_for(None)).evidence(tmp_path))
    assert results == []
    assert set(not_run) == {symptom.name for symptom in EVERY}
    assert set(not_run.values()) == {"there is no AMD GPU", "there is no GPU"}


@pytest.mark.parametrize("damage", ["simd_count x\n", "\x00\xff", "gfx_target_version\n"])
def test_damaged_driver_files_are_no_gpu(damage: str, tmp_path: Path) -> None:
    files: Mapping[str, str] = {"sys/class/kfd/kfd/topology/nodes/1/properties": damage}
    assert Fake(files=dict(files)).evidence(tmp_path).gpus == ()
