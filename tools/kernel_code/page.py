"""Write docs/evidence/kernel-code.md from what tools/kernel_code/listing.py found: a table of AMD's targets per kernel.

python -m tools.kernel_code.page bench/results/kernel_code-2026-11-23.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = """# What the kernels compile to on AMD

    python -m tools.kernel_code.page {file}

wrote this page from what `tools/kernel_code/listing.py` found on {date} with Triton {triton} and no GPU: every kernel,
compiled ahead of time for six targets, with the launches, alignments and address ranges of a usual weight. The tests
check the same code against its limits: no spills, no scratch, at most 64 KiB of LDS, 1,024 threads and 255 registers.

Waves are 64 threads wide on gfx90a, gfx942 and gfx950 and 32 on the others. Instructions are counted once, however
often a loop runs them, and if two are issued together, both count: VALU (vector), SALU (scalar), VMEM (loads and stores
of global memory), LDS, SMEM (scalar loads), branches, waits.

The decoder's code is also executed, without a card: `tests/reference/amdgcn` interprets it on wave64 and wave32, and
for all six targets and three types it gives the bits of the reference and touches no byte outside its tensors. That
verifies the index arithmetic, masks, layouts and rounding of the compiled code. It cannot detect races, missing waits,
cache effects or hazards, and it relies on AMD's manuals (v_fma_mix: rounded to float32, then to float16).
"""
COLUMNS = ("target", "threads", "VGPR", "SGPR", "spills", "LDS bytes", "code", "VALU", "SALU", "VMEM", "LDS", "SMEM")
HEAD = f"| {' | '.join(COLUMNS)} | branches | waits |\n{'|---' * (len(COLUMNS) + 2)}|"


def row(code: dict[str, Any]) -> str:
    """One kernel on one target."""
    memory = code["loads"] + code["stores"]
    names = ("threads", "vector_registers", "scalar_registers", "spills", "lds_bytes", "instructions")
    names += ("vector_operations", "scalar_operations", "", "lds_operations", "scalar_loads", "branches", "waits")
    return f"| {code['target']} | {' | '.join(f'{code[name] if name else memory:,}' for name in names)} |"


def main(file: Path) -> None:
    """Write the page."""
    found = json.loads(file.read_text(encoding="utf-8"))
    date = re.search(r"\d{4}-\d\d-\d\d", file.name)
    about = {"file": file.as_posix(), "date": date[0] if date else "", "triton": found["versions"]["triton"]}
    lines = [PAGE.format(**about)]
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for code in found["codes"]:
        if code["target"].startswith("gfx"):
            by_kernel.setdefault(code["kernel"], []).append(code)
    for kernel, codes in by_kernel.items():
        lines.append("\n".join([f"## {kernel}\n", HEAD, *map(row, codes), ""]))
    page = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "kernel-code.md"
    page.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
