"""What the Triton kernels compile to for each target, without a GPU: registers, spills, memory accesses, operations.

Every kernel is compiled ahead of time with the launch shape, alignments and address ranges that
`nybble.kernels.ops4bit.triton` gives it for a usual weight. Instructions of the machine code are counted once, however
often a loop runs them. The program prints a line for each kernel and target, and one JSON object last.

    python -m tools.kernel_code.listing --out bench/results/kernel_code-$(date +%F).json

It needs Triton and takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nybble.kernels.ops4bit import triton_kernels as kernels
from nybble.kernels.pointwise import triton_kernels as row_kernels

TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201", "sm_80", "sm_90")
_PACKED = {
    "packed_ptr": "*u8",
    "absmax_ptr": "*u8",
    "table_ptr": "*fp32",
    "nested_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "values_ptr": "*fp32",
}
_LADDER = {"ascending_ptr": "*fp32", "midpoints_ptr": "*fp32"}


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched: types of its arguments and values of its constants."""

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    launch: str = ""  # in LAUNCHES, if not the kernel's name
    odd: tuple[str, ...] = ()  # numbers that are no multiples of 16
    is_large: bool = False  # tensors beyond 2 GiB: 64-bit sizes and addresses
    row_numbers: int = 0  # of the row operators: what a program goes through at a time

    @property
    def shape(self) -> kernels.Launch:
        """The launch's."""
        if self.row_numbers:
            warps = {wave: self.row_numbers // row_kernels.PER_THREAD // wave for wave in (64, 32)}
            return kernels.Launch(self.constants.get("tile", self.row_numbers), warps)
        return kernels.LAUNCHES[self.launch or self.kernel]

    @property
    def function(self) -> Any:
        """The kernel."""
        return getattr(row_kernels if self.row_numbers else kernels, self.kernel)


def _dequantize(
    name: str, out: str, is_nested: bool = True, is_large: bool = False, odd: tuple[str, ...] = ()
) -> Variant:
    types = {
        **_PACKED,
        "absmax_ptr": "*u8" if is_nested else "*fp32",
        "out_ptr": out,
        "n": "i64" if is_large else "i32",
    }
    constants = {"nested": is_nested, "log_block": 6}
    return Variant(f"dequantize {name}", "dequantize", types, constants, odd=odd, is_large=is_large)


def _gemv(name: str, rows: int, is_aligned: bool) -> Variant:
    types = {"x_ptr": "*i16", **_PACKED, "out_ptr": "*i16", "n": "i32", "k": "i32"}
    if rows > 1:  # a number of 1 becomes a constant at launch
        types["n_rows"] = "i32"
    constants = {"nested": True, "log_block": 6, "aligned": is_aligned, "rows": rows, "outputs": kernels.GEMV_OUTPUTS}
    if rows == 1:
        constants["n_rows"] = 1
    launch = "gemv" if is_aligned and rows <= 2 else "gemv many"
    return Variant(f"gemv {name}", "gemv", types, constants, launch, ("n_rows",) if is_aligned else ("n_rows", "k"))


def _rows(kernel: str, pointers: str, numbers: str, constants: dict[str, Any], name: str = "") -> Variant:
    """A row operator in bfloat16; `pointers` and `numbers` are names in its signature, `name:type` if not usual."""
    types = {}
    for word in pointers.split():
        pointer, _, kind = word.partition(":")
        types[f"{pointer}_ptr"] = f"*{kind or 'i16'}"
    for word in numbers.split():
        number, _, kind = word.partition(":")
        types[number] = kind or "i32"
    odd = ("eps", "scale", "seed", "threshold", "softcap")
    return Variant(f"{kernel} {name}".strip(), kernel, types, constants, odd=odd, row_numbers=row_kernels.TILE)


ROW_VARIANTS = (
    _rows("rms_norm", "x weight out rstd:fp32", "width eps:fp32", {"unit_offset": False}),
    _rows("rms_norm_backward", "grad x weight rstd:fp32 out", "width", {"unit_offset": False}),
    _rows("gated", "gate up out", "n", {"is_gelu": False}),
    _rows("gated_backward", "grad gate up", "n", {"is_gelu": False}),
    _rows("gated_backward", "grad gate up", "n", {"is_gelu": True}, "gelu"),
    _rows("dropout", "x out", "n seed threshold scale:fp32", {"adds": False}),
    _rows("dropout", "x out", "n seed threshold scale:fp32", {"adds": True}, "add"),
    _rows("cross_entropy", "logits labels:i64 losses:fp32", "width softcap:fp32", {"is_capped": False}),
    _rows("cross_entropy", "logits labels:i64 losses:fp32", "width softcap:fp32", {"is_capped": True}, "capped"),
    _rows(
        "rope",
        "x cos sin out",
        "heads width half row_stride head_stride",
        {"inverse": False, "pairs": 64, "rest": 0, "tile": 32},
    ),
)
VARIANTS = (
    *ROW_VARIANTS,
    _dequantize("bfloat16", "*i16"),
    _dequantize("float16", "*fp16"),
    _dequantize("float32", "*fp32"),
    _dequantize("plain scales", "*i16", is_nested=False),
    _dequantize("odd size", "*i16", odd=("n",)),
    _dequantize("large", "*i16", is_large=True),
    Variant(
        "search_scales",
        "search_scales",
        {
            "weights_ptr": "*bf16",
            "factors_ptr": "*fp32",
            **_LADDER,
            "scales_ptr": "*fp32",
            "n": "i32",
            "n_factors": "i32",
        },
        {"block_size": 64},
        odd=("n_factors",),
    ),
    Variant(
        "nested_codes",
        "nested_codes",
        {
            "weights_ptr": "*bf16",
            "scales_ptr": "*fp32",
            "nested_ptr": "*fp32",
            "offset_ptr": "*fp32",
            "table_ptr": "*fp32",
            "table_midpoints_ptr": "*fp32",
            **_LADDER,
            "codes_ptr": "*u8",
            "n": "i32",
        },
        {"neighbours": 3, "block_size": 64},
    ),
    Variant(
        "nearest_codes",
        "nearest_codes",
        {
            "weights_ptr": "*bf16",
            "scales_ptr": "*fp32",
            "order_ptr": "*i32",
            "midpoints_ptr": "*fp32",
            "packed_ptr": "*u8",
            "n": "i32",
        },
        {"log_block": 6},
    ),
    _gemv("1 row", 1, True),
    _gemv("8 rows", 8, True),
    _gemv("1 row any width", 1, False),
    _gemv("8 rows any width", 8, False),
)


@dataclass(frozen=True)
class Code:
    """The code of one kernel on one target."""

    kernel: str
    target: str
    threads: int
    lds_bytes: int
    vector_registers: int
    scalar_registers: int  # NVIDIA: without uniform ones, which are not reported
    spills: int  # AMD: registers; NVIDIA: bytes
    scratch_bytes: int
    instructions: int  # AMD: of two that issue together, both
    vector_operations: int  # AMD: VALU; NVIDIA: all but memory, control and uniform ones
    per_element: float | None  # of those, for each decoded weight
    selects: int
    divisions: int
    fused: int  # products fused with sums, without the steps of divisions
    loads_16_bytes: int
    stores_16_bytes: int
    loads: int
    stores: int
    # The mix, of AMD alone; with `vector_operations`, `loads` and `stores` it is all of `instructions`.
    matrix_operations: int = 0  # MFMA or WMMA, vector operations too
    lds_operations: int = 0
    scalar_loads: int = 0
    scalar_operations: int = 0
    branches: int = 0
    waits: int = 0
    others: int = 0


def wave(target: str) -> int:
    """Threads in a wave."""
    return 64 if target.startswith("gfx9") else 32


def gpu_target(target: str) -> GPUTarget:
    """The target as Triton names it."""
    if target.startswith("gfx"):
        return GPUTarget("hip", target, wave(target))
    return GPUTarget("cuda", int(target.removeprefix("sm_")), wave(target))


def compiled(variant: Variant, target: str) -> Any:
    """The kernel as Triton's compiler leaves it."""
    function = variant.function
    constants = {**variant.constants, "tile": variant.shape.tile}
    signature = {name: variant.types.get(name, "constexpr") for name in function.arg_names}
    attributes = {}
    is_amd = target.startswith("gfx")
    for i, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr" or name in variant.odd:
            continue
        attributes[(i,)] = [["tt.divisibility", 16]]
        if kind.startswith("*") and is_amd and not variant.is_large:
            attributes[(i,)].append(["tt.pointer_range", 32])
    return triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes),
        target=gpu_target(target),
        options={"num_warps": variant.shape.warps[wave(target)], **kernels.OPTIONS},
    )


def examine(variant: Variant, target: str) -> Code:
    """Compile and count."""
    made = compiled(variant, target)
    threads = variant.shape.warps[wave(target)] * wave(target)
    read = _amd if target.startswith("gfx") else _nvidia
    counts = read(made)
    per_element = None
    if variant.kernel == "dequantize":
        per_element = counts["vector_operations"] * threads / (variant.shape.tile * kernels.CHUNK.value)
    return Code(variant.name, target, threads, made.metadata.shared, per_element=per_element, **counts)


def _amd(made: Any) -> dict[str, int]:
    text = made.asm["amdgcn"]
    # gfx11 and gfx12 write two operations that issue together on one line: v_dual_a .. :: v_dual_b ..
    names = Counter(re.findall(r"(?:^\s+|:: )([a-z][a-z0-9]*_[a-z0-9_]+)", text, re.MULTILINE))

    def field(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]

    def count(pattern: str) -> int:
        return sum(n for name, n in names.items() if re.match(pattern, name))

    divisions = count("v_div_fixup_f32")
    memory = r"(buffer|global|flat)_"
    return {
        "vector_registers": field("vgpr_count"),
        "scalar_registers": field("sgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "scratch_bytes": field("private_segment_fixed_size"),
        "instructions": sum(names.values()),
        "vector_operations": count("v_"),
        "selects": count("v_(dual_)?cndmask"),
        "divisions": divisions,
        # A correctly rounded division is v_div_scale twice, v_rcp, 5 fused steps, v_div_fmas and v_div_fixup.
        "fused": count("v_(pk_|dual_)?(fma|fmac|mad|mac)(ak|mk)?_f32") - 5 * divisions,
        "loads_16_bytes": count(memory + "load_(dwordx4|b128)"),
        "stores_16_bytes": count(memory + "store_(dwordx4|b128)"),
        "loads": count(memory + "load"),
        "stores": count(memory + "store"),
        "matrix_operations": count("v_(mfma|wmma)_"),
        **_mix(names),
    }


def _mix(names: Counter[str]) -> dict[str, int]:
    """AMD's instructions that are neither vector operations nor loads or stores of global memory, by kind."""
    kinds = {
        "lds_operations": "ds_",
        "scalar_loads": "s_(buffer_)?load",
        "branches": "s_(c?branch|setpc|swappc|endpgm)",
        "waits": "s_(waitcnt|wait_|delay_alu|nop|sleep|barrier|clause|code_end|setprio)",
        "scalar_operations": "s_",
        "others": "(?!v_|(buffer|global|flat)_(load|store))",
    }
    found = dict.fromkeys(kinds, 0)
    for name, n in names.items():
        kind = next((kind for kind, pattern in kinds.items() if re.match(pattern, name)), None)
        if kind is not None:
            found[kind] += n
    return found


def _nvidia(made: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name])
        text = _output([triton.knobs.nvidia.nvdisasm.path, "-c", file.name])
    ptx = made.asm["ptx"]
    names = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE))

    def count(pattern: str) -> int:
        return sum(n for name, n in names.items() if re.match(pattern, name))

    others = r"(LD|ST|ATOM|RED|BAR|BRA|EXIT|NOP|BSSY|BSYNC|CALL|RET|S2|CS2|DEPBAR|U|R2UR|WARPSYNC|MEMBAR|ERRBAR)"
    return {
        "vector_registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "scalar_registers": 0,
        "spills": int(re.search(r"LOCAL:(\d+)", usage)[1]) + count("(LDL|STL)"),  # type: ignore[index]
        "scratch_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "instructions": sum(names.values()) - count("NOP"),
        "vector_operations": sum(names.values()) - count(others),
        "selects": count("F?SEL"),
        "divisions": len(re.findall(r"\bdiv\.rn\.f32", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),  # in the machine code divisions are made of them; ptxas fuses none
        "loads_16_bytes": count(r"LDG.*\.128"),
        "stores_16_bytes": count(r"STG.*\.128"),
        "loads": count("LDG"),
        "stores": count("STG"),
    }


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def everything() -> Iterator[Code]:
    """All variants on all targets, compiled without a cache."""
    for variant in VARIANTS:
        for target in TARGETS:
            yield examine(variant, target)


def main() -> None:
    """Compile, print, and write the JSON object if asked to."""
    from nybble.training import software_versions  # slow to import, and the tests that use this file need none of it

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON object goes as well")
    arguments = parser.parse_args()
    print(f"{'kernel':<24} {'target':<8} threads  LDS VGPR SGPR spill  code  VALU /elem  sel 16B loads 16B stores")
    codes = []
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        triton.knobs.cache.dir = cache
        for code in everything():
            codes.append(code)
            per = "     -" if code.per_element is None else f"{code.per_element:6.2f}"
            print(
                f"{code.kernel:<24} {code.target:<8} {code.threads:>7} {code.lds_bytes:>4} {code.vector_registers:>4} "
                f"{code.scalar_registers:>4} {code.spills:>5} {code.instructions:>5} {code.vector_operations:>5} {per} "
                f"{code.selects:>4} {code.loads_16_bytes:>4}/{code.loads:<4} {code.stores_16_bytes:>5}/{code.stores}"
            )
    versions = {**software_versions(), "triton": triton.__version__}
    result = {"codes": [asdict(code) for code in codes], "device": "none: compiled ahead of time", "versions": versions}
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
