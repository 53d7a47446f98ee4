"""Every Triton kernel compiles for every target with no GPU, and the code is what its design asks for.

What is compiled, and how the code is read, is `tools/kernel_code/listing.py`; the figures it prints are these.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch

from nybble.quant import encode, search

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201", "sm_80", "sm_90")
DECODERS = tuple(f"dequantize {what}" for what in ("float16", "float32", "plain scales", "odd size", "large"))
ENCODERS = ("search_scales", "nested_codes", "nearest_codes")
GEMVS = tuple(f"gemv {what}" for what in ("1 row", "8 rows", "1 row any width", "8 rows any width"))
# Row operators: 16-byte loads and stores in the code, with a loop's once; a row's own few numbers come beside them.
ROWS = {
    "rms_norm": (3, 1),
    "rms_norm_backward": (6, 1),
    "gated": (2, 1),
    "gated_backward": (3, 3),
    "gated_backward gelu": (3, 3),
    "dropout": (1, 1),
    "dropout add": (2, 1),
    "cross_entropy": (2, 1),
    "cross_entropy capped": (2, 1),
    "rope": (6, 2),
}
LDS_BYTES = 64 * 1024
THREADS = 1024
VECTOR_OPERATIONS = 16  # for a decoded weight on gfx90a, where more than this binds; choosing by comparisons takes 34
SELECTS = 20  # of a decoder, for its masks; choosing among 16 values would take 15 for each of a thread's 32
Examine = Callable[[str, str], Any]


def long_matrix(targets: tuple[str, ...], *always: str) -> list[Any]:
    """Targets to compile for: those that are not in `always` in `make test-all` alone."""
    return [pytest.param(t, marks=() if t in always else pytest.mark.nightly) for t in targets]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("tools.kernel_code.listing")  # which imports Triton


@pytest.fixture(scope="module")
def examine(script: ModuleType, triton_cache: None) -> Examine:
    """The code of a variant on a target, compiled once."""
    variants = {variant.name: variant for variant in script.VARIANTS}
    return cache(lambda name, target: script.examine(variants[name], target))


def test_every_kernel_and_target_is_looked_at(script: ModuleType) -> None:
    assert script.TARGETS == TARGETS
    names = {*DECODERS, *ENCODERS, *GEMVS, *ROWS, "dequantize bfloat16"}
    assert {variant.name for variant in script.VARIANTS} == names
    kernels = {variant.kernel for variant in script.VARIANTS}
    assert kernels == {"dequantize", *ENCODERS, "gemv", *(name.split()[0] for name in ROWS)}


@pytest.mark.parametrize("target", long_matrix(TARGETS, "gfx942", "sm_90"))
@pytest.mark.parametrize("name", ["dequantize bfloat16", *DECODERS, *ENCODERS, *GEMVS, *ROWS])
def test_code_is_what_its_design_asks_for(examine: Examine, name: str, target: str) -> None:
    code = examine(name, target)
    spills_nothing_and_fits(code)
    if name in ENCODERS or name.startswith(("dequantize", "dropout")):  # the others are held to a tolerance
        assert code.fused == 0
    if name.startswith("dequantize"):
        decoder_moves_16_bytes_at_a_time(code, is_float32=name.endswith("float32"))
        decoder_looks_values_up(code)
    if name in ENCODERS:
        assert code.divisions > 0  # as IEEE divides
    if name in ROWS:
        row_operator_moves_16_bytes_at_a_time(code, *ROWS[name])


def spills_nothing_and_fits(code: Any) -> None:
    assert (code.spills, code.scratch_bytes) == (0, 0)
    assert code.lds_bytes <= LDS_BYTES
    assert code.threads <= THREADS
    assert code.vector_registers <= 255


def decoder_moves_16_bytes_at_a_time(code: Any, is_float32: bool) -> None:
    assert code.loads_16_bytes == 1  # 32 codes, all that a thread decodes
    assert code.stores_16_bytes == (8 if is_float32 else 4)
    assert code.stores - code.stores_16_bytes == 1  # of the last n % 32 weights


def decoder_looks_values_up(code: Any) -> None:
    assert code.selects <= SELECTS
    assert code.per_element <= VECTOR_OPERATIONS


def row_operator_moves_16_bytes_at_a_time(code: Any, loads: int, stores: int) -> None:
    assert code.threads == 256
    assert code.loads_16_bytes >= loads  # more where a loop was unrolled
    assert code.stores_16_bytes >= stores
    assert code.loads - code.loads_16_bytes <= 1
    assert code.stores - code.stores_16_bytes <= 1


class Driver:
    """Stands where Triton asks for the device at hand; kernels are kept by the device's number."""

    def __init__(self, target: Any, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def launches(
    examine: Examine, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, list[Any]]]:
    """Sets a target; launches then end with the compiled kernel, noted under its name."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from nybble.kernels.ops4bit import triton as gpu
    from nybble.kernels.pointwise import triton as gpu_rows

    made: dict[str, list[Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        code = run(self, *arguments, grid=grid, warmup=True, **options)
        made.setdefault(self.fn.__name__, []).append(code)

    def aim(target: str) -> dict[str, list[Any]]:
        for launching in (gpu, gpu_rows):
            monkeypatch.setattr(launching, "wave_of", lambda _: script.wave(target))
        monkeypatch.setattr(driver, "_active", Driver(script.gpu_target(target), 100 + TARGETS.index(target)))
        return made

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return aim


@pytest.mark.parametrize("target", long_matrix(("gfx90a", "gfx1100", "sm_90"), "gfx90a", "sm_90"))
def test_launches_compile_as_they_are_made(
    launches: Callable[[str], dict[str, list[Any]]], script: ModuleType, target: str
) -> None:
    """Types, alignments and constants come from real arguments here; numbers that are 1 become constants."""
    from nybble.kernels.ops4bit import triton as gpu

    made = launches(target)
    for shape in ((1, 1), (64, 128)):
        flat = torch.randn(shape, dtype=torch.bfloat16).view(-1)
        weight = encode(flat.view(shape))
        gpu.dequantize(weight, torch.empty(shape, dtype=torch.bfloat16))
        gpu.multiply(flat.view(shape)[:8].contiguous(), weight)
        scales = torch.ones(-(-flat.numel() // 64))
        gpu.search_scales(flat, "nf4", 64, True)
        gpu.nested_codes(flat, "nf4", 64, scales, *search.nest_scales(scales))
        gpu.nearest_codes(flat, "nf4", 64, scales)
    assert {name: len(codes) for name, codes in made.items()} == dict.fromkeys(
        ("dequantize", "gemv", "search_scales", "nested_codes", "nearest_codes"), 2
    )
    for code in (code for codes in made.values() for code in codes):
        assert code.metadata.enable_fp_fusion is False
        assert code.metadata.num_warps * script.wave(target) == 256
    wide = {"g": "buffer_store_(dwordx4|b128)", "s": r"st\.global\.v4\.b32"}[target[0]]
    usual = made["dequantize"][1].asm
    assert len(re.findall(wide, usual.get("amdgcn") or usual["ptx"])) == 4


@pytest.mark.parametrize("target", long_matrix(("gfx90a", "gfx1100", "sm_90"), "gfx90a", "sm_90"))
def test_launches_of_row_operators_compile_as_they_are_made(
    launches: Callable[[str], dict[str, list[Any]]], script: ModuleType, target: str
) -> None:
    from nybble.kernels.pointwise import triton as gpu_rows

    made = launches(target)
    for n, width in ((1, 1), (3, 4096)):
        x, y, z = torch.randn(3, n, width, dtype=torch.bfloat16)
        gpu_rows.rms_norm_backward(y, x, z[0], gpu_rows.rms_norm(x, z[0].float(), 1e-6, True)[1], False)
        gpu_rows.gated(x, y, "silu")
        gpu_rows.gated_backward_(x, y, z, "gelu_tanh")
        for seed in (1, 16, 2**31, -5):  # compiled once: a seed is a number like any other
            gpu_rows.dropout(x, 0.1, seed, y)
        gpu_rows.dropout_add_(x, y, 0.1, 3)
        gpu_rows.cross_entropy_(x, torch.zeros(n, dtype=torch.int64), 30.0)
        heads = torch.randn(n, width, 128, dtype=torch.bfloat16)[:, :32]
        gpu_rows.rope(heads, y[:, :64].expand(n, 64), y[:, :64].expand(n, 64), True)
    hashes = {name: [code.hash for code in codes] for name, codes in made.items()}
    assert set(hashes) == {name.split()[0] for name in ROWS}
    assert {name: len(set(of)) for name, of in hashes.items()} == {**dict.fromkeys(hashes, 2), "dropout": 4}
    for code in (code for codes in made.values() for code in codes):
        assert code.metadata.enable_fp_fusion is False
        assert code.metadata.num_warps * script.wave(target) <= 256
