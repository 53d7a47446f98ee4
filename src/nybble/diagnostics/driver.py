"""Known failures of the driver, permissions and the card, detected without torch.

They are listed so that each explains those after it.
"""

from __future__ import annotations

import re

from nybble.diagnostics.evidence import NO_AMD_GPU, Evidence, Fault, Symptom
from nybble.diagnostics.machine import VISIBLE_DEVICES, version_tuple
from nybble.units import format_bytes

_PAGE_BYTES = 4096
_STRIX = ("gfx1150", "gfx1151")
_GOOD_KERNEL = (6, 18, 4)
_BAD_FIRMWARE = "20251125"


def _driver_missing(seen: Evidence) -> Fault | None:
    machine = seen.machine
    if machine.is_wsl:
        return None  # there is no kernel driver inside Windows; see the symptom "Windows"
    if (machine.root / "dev/kfd").exists():
        return None
    if machine.is_container:
        return Fault(
            "/dev/kfd is not in this container", "docker run --device=/dev/kfd --device=/dev/dri --group-add video .."
        )
    if not (machine.root / "sys/module/amdgpu").is_dir():
        return Fault("the kernel module amdgpu is not loaded", "sudo modprobe amdgpu")
    return Fault(
        "amdgpu is loaded, but its compute interface /dev/kfd is missing",
        "sudo modprobe -r amdgpu && sudo modprobe amdgpu",
    )


def _no_permission(seen: Evidence) -> Fault | None:
    machine = seen.machine
    nodes = [machine.root / "dev/kfd", *sorted((machine.root / "dev/dri").glob("renderD*"))]
    closed = [node for node in nodes if node.exists() and not machine.can_open(node)]
    if not closed:
        return None
    groups = sorted({node.stat().st_gid for node in closed})
    names = dict(re.findall(r"^([^:\n]+):[^:]*:(\d+):", machine.text("etc/group"), re.MULTILINE))
    named = [name for name, number in names.items() if int(number) in groups]
    what = ", ".join(f"/{node.relative_to(machine.root)}" for node in closed)
    if machine.is_container:
        fix = "docker run " + " ".join(f"--group-add {number}" for number in groups) + " .."
    else:
        fix = f"sudo usermod -aG {','.join(named or ['render', 'video'])} $USER  # then log in again"
    return Fault(f"this user has no permission to open {what}", fix)


def _visible_devices(seen: Evidence) -> Fault | None:
    environ = seen.machine.environ
    gpus = seen.gpus
    if not gpus:
        return None
    visible = seen.machine.visible_gpus
    if not visible:
        chain = ", ".join(f"{name}={environ[name]!r}" for name in VISIBLE_DEVICES if name in environ)
        cause = f"these variables, which apply one after the other, hide all {len(gpus)} GPU(s): {chain}"
        return Fault(cause, "unset ROCR_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES; export HIP_VISIBLE_DEVICES=0")
    discrete = [i for i, gpu in enumerate(gpus) if not gpu.is_apu]
    if discrete and gpus[visible[0]].is_apu:
        return Fault(
            f"device 0 is the integrated {gpus[visible[0]].gfx}, not the {gpus[discrete[0]].gfx} card",
            f"export HIP_VISIBLE_DEVICES={discrete[0]}",
        )
    return None


def _shared_memory(seen: Evidence) -> Fault | None:
    machine = seen.machine
    apus = [gpu for gpu in seen.gpus if gpu.is_apu]
    if not apus or len(apus) < len(seen.gpus):
        return None
    gpu = apus[0]
    kernel = version_tuple(machine.kernel)
    if gpu.gfx in _STRIX and kernel < _GOOD_KERNEL:
        return Fault(
            f"kernel {machine.kernel} makes {gpu.gfx} hang; 6.18.4 is the first version that does not",
            "sudo apt full-upgrade",
        )
    firmware = re.search(
        r"Package: linux-firmware\n(?:.+\n)*?Version: (\S+)", machine.text("var/lib/dpkg/status") + "\n"
    )
    if firmware and _BAD_FIRMWARE in firmware[1]:
        return Fault(
            f"linux-firmware {firmware[1]} makes this GPU freeze", "sudo apt install --only-upgrade linux-firmware"
        )
    usable_bytes = gpu.total_bytes + gpu.shared_total_bytes
    wanted_bytes = int(0.75 * machine.memory_bytes)
    if machine.memory_bytes and usable_bytes < wanted_bytes:
        pages = wanted_bytes // _PAGE_BYTES
        return Fault(
            f"the GPU may use only {format_bytes(usable_bytes)} of {format_bytes(machine.memory_bytes)}",
            f"echo 'options ttm pages_limit={pages}' | sudo tee /etc/modprobe.d/ttm.conf  # then reboot",
        )
    return None


def _memory_held(seen: Evidence) -> Fault | None:
    holders = seen.machine.holders()
    total = max((gpu.total_bytes for gpu in seen.gpus), default=0)
    held_bytes = sum(holders.values())
    if not total or held_bytes < 0.1 * total:
        return None
    numbers = sorted(holders, key=lambda number: -holders[number])
    named = [
        f"{number} ({seen.machine.text(f'proc/{number}/comm') or '?'}): {format_bytes(holders[number])}"
        for number in numbers
    ]
    return Fault(
        f"other processes use {format_bytes(held_bytes)} of {format_bytes(total)}: {', '.join(named)}",
        f"kill {' '.join(map(str, numbers))}",
    )


def _partitioned(seen: Evidence) -> Fault | None:
    split = [gpu for gpu in seen.gpus if gpu.partition not in ("", "SPX")]
    if not split:
        return None
    cause = f"{split[0].gfx} is split ({split[0].partition}): each part has {format_bytes(split[0].total_bytes)}"
    return Fault(cause, "sudo amd-smi set --gpu all --compute-partition SPX")


def _faulted_before(seen: Evidence) -> Fault | None:
    pattern = r"\[gfxhub\d*\].*page fault|amdgpu.*ring \S+ timeout|amdgpu.*MODE\d reset|amdgpu.*GPU reset"
    match = re.search(pattern, seen.machine.kernel_messages())
    return Fault(f"the kernel log contains: {match[0][:100]}", "sudo reboot") if match else None


def _card_unwell(seen: Evidence) -> Fault | None:
    for gpu in seen.gpus:
        if gpu.uncorrectable_errors:
            return Fault(f"{gpu.gfx} reports {gpu.uncorrectable_errors} uncorrectable memory errors", "sudo reboot")
        if gpu.link_width and gpu.link_width[0] < gpu.link_width[1] and not gpu.is_apu:
            n_lanes, most_lanes = gpu.link_width
            return Fault(
                f"{gpu.gfx} runs on {n_lanes} of {most_lanes} PCIe lanes; reseat the card",
                "sudo lspci -vv | grep LnkSta",
            )
        if gpu.celsius and gpu.critical_celsius and gpu.celsius > gpu.critical_celsius - 5:
            cause = f"{gpu.gfx} is at {gpu.celsius:.0f} °C and slows down at {gpu.critical_celsius:.0f} °C"
            return Fault(cause, "amd-smi monitor --temperature --clock")
    return None


def _windows(seen: Evidence) -> Fault | None:
    machine = seen.machine
    build = machine.torch
    if machine.system == "Windows":
        if "triton-windows" not in machine.packages and "triton" not in machine.packages:
            return Fault(
                "torch includes no Triton for Windows, so the slower torch backends run", "pip install triton-windows"
            )
        return None
    if not (machine.root / "dev/dxg").exists():
        return Fault(
            "WSL shows no GPU (/dev/dxg) because the Windows driver is too old",
            "wsl --update  # and Adrenalin 26.2.2",
        )
    rocm = build.rocm_version if build else ()
    if rocm and rocm < (7, 13) and machine.environ.get("HSA_ENABLE_DXG_DETECTION") != "1":
        version = ".".join(map(str, rocm))
        return Fault(f"ROCm {version} does not detect the GPU of WSL by default", "export HSA_ENABLE_DXG_DETECTION=1")
    return None


def _skip_windows(seen: Evidence) -> str | None:
    if not seen.is_amd:
        return NO_AMD_GPU
    return None if seen.machine.system == "Windows" or seen.machine.is_wsl else "this is neither Windows nor WSL"


SYMPTOMS = (
    Symptom("driver", "ROCk module is NOT loaded; torch sees no GPU", "ROCm/legacy-rocm-build#1893", _driver_missing),
    Symptom("permission", "torch sees no GPU for this user only", "ROCm/legacy-rocm-build#3072", _no_permission),
    Symptom(
        "visible devices",
        "torch uses the wrong card, or runs out of memory at 512 MB",
        "unslothai/unsloth#7776",
        _visible_devices,
    ),
    Symptom(
        "shared memory", "out of memory although RAM is free, or freezes", "pytorch/pytorch#107605", _shared_memory
    ),
    Symptom("memory held by others", "out of memory while loading", "", _memory_held),
    Symptom(
        "partition",
        "a card with 192 GB offers only 24 GB",
        "",
        _partitioned,
    ),
    Symptom(
        "faults since the start", "further crashes after a first crash", "ROCm/legacy-rocm-build#6600", _faulted_before
    ),
    Symptom("health of the card", "training is slower than before", "", _card_unwell),
    Symptom("Windows", "no GPU, or no Triton, under Windows or WSL", "ROCm/ROCm#6022", _windows, _skip_windows),
)
