"""Known failures of the installation and the environment: wheels for other GPUs, variables, mismatched libraries."""

from __future__ import annotations

import re

from nybble.diagnostics.evidence import NO_AMD_GPU, Evidence, Fault, Symptom
from nybble.diagnostics.machine import TorchBuild, version_tuple
from nybble.hardware import NO_BFLOAT16

AMD_INDEX = "https://repo.amd.com/rocm/whl-multi-arch/"
TORCH_INDEX = "https://download.pytorch.org/whl"
# AOTriton 0.12 and 0.13 support these only if a variable asks for it before torch is imported.
EXPERIMENTAL_ATTENTION = frozenset(["gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1152", "gfx1153", "gfx1200"])
NO_FLASH_ATTENTION = ("gfx906", "gfx908", "gfx10")
NO_TRITON = ("gfx10",)
_BOUND_ERRORS = ((7, 2), (10, 0))  # first and last ROCm whose hipBLASLt reads past rank-8 operands on RDNA4
_ROCM_TRITON = ("triton-rocm", "pytorch-triton-rocm")
# The first is torch's variable, the second that of rocBLAS, which may call hipBLASLt too.
WITHOUT_HIPBLASLT = ("TORCH_BLAS_PREFER_HIPBLASLT", "ROCBLAS_USE_HIPBLASLT")
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def install_command(gfx: str) -> str:
    """The command that installs torch for an AMD GPU."""
    if gfx == "gfx906":
        return f"pip install --force-reinstall torch --index-url {TORCH_INDEX}/rocm6.3"
    if gfx.startswith(("gfx110", "gfx115", "gfx120")):
        return f'pip install --force-reinstall --index-url {AMD_INDEX} "torch[device-{gfx}]"'
    return f"pip install --force-reinstall torch --index-url {TORCH_INDEX}/rocm7.2"


def reads_past_ranks(build: TorchBuild | None, gfx: str) -> bool:
    """Whether this ROCm's hipBLASLt reads past the end of matrices as narrow as a LoRA's on this GPU."""
    rocm = build.rocm_version if build else ()
    return gfx.startswith("gfx120") and bool(rocm) and _BOUND_ERRORS[0] <= rocm <= _BOUND_ERRORS[1]


def _spoofed(seen: Evidence) -> Fault | None:
    claimed = seen.machine.environ.get("HSA_OVERRIDE_GFX_VERSION")
    for gpu in seen.gpus:
        if claimed is None:
            continue
        parts = version_tuple(claimed)
        name = f"gfx{parts[0]}{parts[1]}{parts[2]:x}" if len(parts) == 3 else repr(claimed)
        # One use is harmless: all GPUs of the RDNA2 family run code for gfx1030.
        if name != gpu.gfx and not (name == "gfx1030" and gpu.gfx.startswith("gfx103")):
            cause = f"HSA_OVERRIDE_GFX_VERSION={claimed} claims {name}, but the driver reports {gpu.gfx}"
            return Fault(cause, f"unset HSA_OVERRIDE_GFX_VERSION && {install_command(gpu.gfx)}")
    from_torch = {str(device.get("gfx") or "") for device in seen.torch.devices} if seen.torch else set()
    from_driver = {gpu.gfx for gpu in seen.gpus}
    if claimed is None and from_driver and (unknown := from_torch - from_driver - {""}):
        return Fault(
            f"torch reports {', '.join(unknown)}, but the driver reports {', '.join(from_driver)}",
            "unset HSA_OVERRIDE_GFX_VERSION",
        )
    return None


def _wrong_build(seen: Evidence) -> Fault | None:
    build = seen.machine.torch
    if build is None:
        return Fault(
            "torch is not installed", install_command(next(iter(seen.gfx), "")) if seen.is_amd else "pip install torch"
        )
    if seen.machine.has_amd_card and not build.is_rocm:
        gfx = next(iter(seen.gfx), "")
        return Fault(f"{build.description} cannot use the AMD GPU ({gfx or 'no driver'})", install_command(gfx))
    if seen.machine.has_nvidia_card and not build.cuda and not build.is_rocm:
        fix = f"pip install --force-reinstall torch --index-url {TORCH_INDEX}/cu128"
        return Fault(f"{build.description} cannot use the NVIDIA GPU", fix)
    return None


def _no_kernels(seen: Evidence) -> Fault | None:
    build = seen.machine.torch
    if build is None or not build.is_rocm:
        return None
    for gfx in sorted(seen.gfx):
        by_device = [name for name in seen.machine.packages if name.startswith("amd-torch-device-gfx")]
        if ("rocm-sdk-core" in seen.machine.packages or by_device) and f"amd-torch-device-{gfx}" not in by_device:
            installed = ", ".join(name.removeprefix("amd-torch-device-") for name in by_device) or "none"
            return Fault(f"torch's kernels for {gfx} are not installed (installed: {installed})", install_command(gfx))
        names = seen.torch.architectures if seen.torch else ()
        if names and not any(name == gfx or _covers(name, gfx) for name in names):
            return Fault(f"this torch has kernels for {', '.join(names)}, but not for {gfx}", install_command(gfx))
    return None


def _covers(generic: str, gfx: str) -> bool:
    """Whether a generic target such as "gfx11-generic" or "gfx9-4-generic" includes an architecture."""
    family = generic.removesuffix("-generic").replace("-", "")
    return generic.endswith("-generic") and gfx.startswith(family)


def _mixed_runtimes(seen: Evidence) -> Fault | None:
    loaded = sorted(set(seen.torch.hip_libraries)) if seen.torch else []
    if len(loaded) > 1:
        return Fault(f"several copies of the HIP runtime are loaded: {', '.join(loaded)}", "unset LD_LIBRARY_PATH")
    build = seen.machine.torch
    for folder in filter(None, seen.machine.environ.get("LD_LIBRARY_PATH", "").split(":")):
        if build and build.is_rocm and any((seen.machine.root / folder.lstrip("/")).glob("libamdhip64.so*")):
            fix = f'export LD_LIBRARY_PATH="${{LD_LIBRARY_PATH//{folder}/}}"'
            return Fault(f"LD_LIBRARY_PATH puts the ROCm in {folder} before the one that torch includes", fix)
    return None


def _bitsandbytes(seen: Evidence) -> Fault | None:
    version = seen.machine.package("bitsandbytes")
    build = seen.machine.torch
    upgrade = 'pip install -U "bitsandbytes>=0.50"'
    if version is not None and version < (0, 50):
        installed = seen.machine.packages["bitsandbytes"]
        return Fault(f"4-bit decoding on AMD is unreliable in bitsandbytes {installed}; it needs 0.50", upgrade)
    hip = version_tuple(build.hip or "") if build else ()
    if hip and hip[0] not in (6, 7):
        return Fault(
            f"bitsandbytes has no library for HIP {build.hip if build else ''}", "pip uninstall -y bitsandbytes"
        )
    return None


def _skip_bitsandbytes(seen: Evidence) -> str | None:
    if not seen.is_amd:
        return NO_AMD_GPU
    if "bitsandbytes" in seen.machine.packages:
        return None
    return "bitsandbytes is not installed, and nothing here needs it"


def _triton(seen: Evidence) -> Fault | None:
    old = sorted(gfx for gfx in seen.gfx if gfx.startswith(NO_TRITON))
    if old:
        return Fault(f"Triton 3.9 does not compile for {old[0]}, so the torch backends run", "nybble doctor --quick")
    from_torch = [name for name in _ROCM_TRITON if name in seen.machine.packages]
    if seen.is_amd and from_torch and "triton" in seen.machine.packages:
        cause = f"PyPI's triton has overwritten {from_torch[0]}, which torch needs"
        return Fault(cause, f"pip uninstall -y triton && pip install --force-reinstall --no-deps {from_torch[0]}")
    if not seen.machine.has_compiler:
        cause = "Triton compiles a launcher on first use, but a C compiler or Python.h is missing"
        return Fault(cause, "sudo apt install gcc python3-dev")
    return None


def _skip_triton(seen: Evidence) -> str | None:
    if not seen.machine.has_amd_card and not seen.machine.has_nvidia_card:
        return "there is no GPU"
    names = ("triton", *_ROCM_TRITON, "triton-windows")
    return None if any(name in seen.machine.packages for name in names) else "triton is not installed"


def _attention_held_back(seen: Evidence) -> Fault | None:
    if seen.machine.environ.get("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL") != "1":
        experimental = sorted(seen.gfx & EXPERIMENTAL_ATTENTION)
        if experimental:
            cause = f"torch's flash attention for {experimental[0]} is off unless a variable turns it on"
            return Fault(cause, "export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1")
    without = sorted(gfx for gfx in seen.gfx if gfx.startswith(NO_FLASH_ATTENTION))
    if without:
        cause = f"torch has no flash attention for {without[0]}, so memory grows with the square of max_length"
        return Fault(cause, "nybble train .. --max_length 1024")
    return None


def _reads_past_ranks(seen: Evidence) -> Fault | None:
    build = seen.machine.torch
    gfx = next(iter(seen.gfx), "")
    avoided = all(seen.machine.environ.get(name) == "0" for name in WITHOUT_HIPBLASLT)
    if avoided or build is None or not reads_past_ranks(build, gfx):
        return None
    cause = (
        f"hipBLASLt of ROCm {'.'.join(map(str, build.rocm_version))} reads past the end of matrices as narrow as a "
        f"LoRA's on {gfx}"
    )
    return Fault(cause, f"export {' '.join(f'{name}=0' for name in WITHOUT_HIPBLASLT)}")


def _paged_optimizer(seen: Evidence) -> Fault | None:
    if not seen.optim.startswith("paged_"):
        return None
    plain = "adamw_torch_fused" if "adamw" in seen.optim else "adafactor"
    return Fault(
        f"optim {seen.optim} pages its state, which makes Radeon cards hang and saves no memory for LoRA",
        f"--optim {plain}",
    )


def _skip_optimizer(seen: Evidence) -> str | None:
    if not seen.is_amd:
        return NO_AMD_GPU
    return None if seen.optim else "there is no run, so no optimizer to check"


def _growing_segments(seen: Evidence) -> Fault | None:
    for name in ALLOCATOR_VARIABLES:
        if re.search(r"expandable_segments\s*:\s*true", seen.machine.environ.get(name, ""), re.IGNORECASE):
            return Fault(f"{name} turns on expandable_segments, which hang on ROCm", f"unset {name}")
    return None


def _no_bfloat16(seen: Evidence) -> Fault | None:
    without = sorted(gfx for gfx in seen.gfx if gfx.startswith(NO_BFLOAT16))
    if not without:
        return None
    return Fault(
        f"{without[0]} computes bfloat16 slowly or not at all", "nybble train .. --bnb_4bit_compute_dtype float16"
    )


SYMPTOMS = (
    Symptom("architecture", "invalid ISA, hangs, wrong results", "unslothai/unsloth#7331", _spoofed),
    Symptom(
        "torch build",
        "torch.cuda.is_available() is False",
        "https://pytorch.org/get-started/locally/",
        _wrong_build,
        lambda seen: (
            None
            if seen.machine.torch is None or seen.machine.has_amd_card or seen.machine.has_nvidia_card
            else "there is no GPU"
        ),
    ),
    Symptom("torch kernels", "invalid device function; hipErrorNoBinaryForGpu", "pytorch/pytorch#164346", _no_kernels),
    Symptom("one ROCm", "undefined symbol hsa_..", "ROCm/TheRock#1184", _mixed_runtimes),
    Symptom(
        "bitsandbytes build",
        "NaN, or wrong numbers without an error",
        "bitsandbytes-foundation/bitsandbytes#1890",
        _bitsandbytes,
        _skip_bitsandbytes,
    ),
    Symptom("Triton's needs", "unsupported target; gcc not found", "unslothai/unsloth#11614", _triton, _skip_triton),
    Symptom(
        "flash attention",
        "training is ten times slower, and memory grows with max_length²",
        "ROCm/TheRock#1364",
        _attention_held_back,
    ),
    Symptom(
        "rank-8 products",
        "page fault in the backward pass of a LoRA, always at the same step",
        "ROCm/rocm-libraries#7992",
        _reads_past_ranks,
    ),
    Symptom("paged optimizer", "GPU hang and reset", "unslothai/unsloth#11498", _paged_optimizer, _skip_optimizer),
    Symptom("allocator", "hangs when the model is moved to the GPU", "pytorch/pytorch#192259", _growing_segments),
    Symptom("bfloat16", "training is slow, or the loss is NaN", "", _no_bfloat16),
)
