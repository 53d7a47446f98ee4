"""The Triton kernels' NVIDIA code, executed without a card, gives what plain torch gives, and no barrier is missing.

`ptx` beside this file interprets what Triton's compiler leaves for a target; each kernel is launched by the code that
launches it on a GPU. The long matrix takes every type, target and Triton. The Tritons that are not installed lie in a
folder named by NYBBLE_TRITONS, by default build/tritons, each in a folder named as its version:

    pip install --no-deps --target build/tritons/3.6.0 triton==3.6.0
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_89", "sm_90")
KINDS = ("bfloat16", "float16", "float32")
TRITONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0")  # of torch 2.9, 2.11, 2.12, 2.13 and 2.14; 3.9 is installed
CASES_OF_A_KIND = 70  # at least
# Of each kernel a case in which a fault shows, by its number.
SHOWN = {"gated": -1, "gated_backward": -1, "dropout": -1, "cross_entropy": -1}
# One instruction is changed, in the middle of those that match, and another result or an error must come of it.
MUTATIONS = {
    "product becomes sum": (r"mul\.(rn\.)?f32", "add.rn.f32"),
    "shift turns round": (r"shl\.b32", "shr.u32"),
    "and becomes or": (r"and\.b32", "or.b32"),
    "difference becomes sum": (r"sub\.(rn\.)?f32", "add.rn.f32"),
    "lanes keep their own": (r"(shfl\.sync\.bfly\.b32.*?), \d+, 31, -1", r"\1, 0, 31, -1"),
}
POINTWISE = ("rms_norm", "rms_norm_backward", "gated", "gated_backward", "dropout", "cross_entropy", "rope")
ENCODER = ("search_scales", "nested_codes", "nearest_codes")
CAUGHT = {
    "product becomes sum": (*POINTWISE, "dequantize", "gemv", "search_scales", "nearest_codes"),
    "shift turns round": (*POINTWISE, "dequantize", *ENCODER),
    "and becomes or": ("rms_norm", "gated", "gated_backward", "dropout", "rope", "dequantize", *ENCODER),
    "difference becomes sum": ("rms_norm_backward", "gated_backward", "cross_entropy", "rope", "search_scales"),
    "lanes keep their own": ("rms_norm", "rms_norm_backward", "cross_entropy", "search_scales", "nested_codes"),
}
BARRIER = r"bar\.sync[^;]*;"
WITHOUT_BARRIERS = ("gated", "gated_backward", "dropout", "rope")  # rope's stand in programs of one warp


@pytest.fixture(scope="module")
def ptx() -> Iterator[Callable[[str], Any]]:
    """`ptx("cases")`: a module of the interpreter's package, which lies beside this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield lambda name: importlib.import_module(f"ptx.{name}")


@pytest.fixture(scope="module")
def shown(ptx: Callable[[str], Any], triton_cache: None) -> dict[str, Any]:
    """One case of each kernel, in bfloat16."""
    by_kernel: dict[str, list[Any]] = {}
    for case in ptx("cases").every_case("bfloat16"):
        by_kernel.setdefault(case.kernel, []).append(case)
    return {kernel: cases[SHOWN.get(kernel, 0)] for kernel, cases in by_kernel.items()}


@pytest.fixture(scope="module")
def of_several_warps(ptx: Callable[[str], Any], shown: dict[str, Any]) -> dict[str, Any]:
    """The same, but the norms with rows as wide as a model's: narrow ones take one warp, which needs no barrier."""
    norms = {case.kernel: case for case in ptx("cases").every_case("bfloat16") if case.kernel.startswith("rms_norm")}
    return {**shown, **norms}


@pytest.fixture(scope="module")
def error(ptx: Callable[[str], Any]) -> Callable[..., float]:
    """`error(case, change, **how)`: of a case on sm_90, whose PTX is changed first."""

    def of(case: Any, change: Callable[[str], str] = lambda text: text, **how: bool) -> float:
        launches = ptx("launches")
        with launches.launching("sm_90", launches.Executor(change, **how)):
            return float(case.error())

    return of


def replaced(pattern: str, replacement: str, number: int | None = None) -> Callable[[str], str]:
    """Replaces one match, the middle one if none is named."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert found, f"{pattern} is not in the kernel"
        match = found[len(found) // 2 if number is None else number]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    return change


def test_every_kernel_is_executed(shown: dict[str, Any]) -> None:
    import triton

    from nybble.kernels.ops4bit import triton_kernels as ops4bit
    from nybble.kernels.pointwise import triton_kernels as pointwise

    kernels = {
        name
        for module in (ops4bit, pointwise)
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and not name.startswith("_")
    }
    assert set(shown) == kernels


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_gives_what_plain_torch_gives(
    ptx: Callable[[str], Any], triton_cache: None, target: str, kind: str
) -> None:
    found = ptx("sweep").sweep(target, [kind])
    assert found["wrong"] == []
    assert found["cases"] >= CASES_OF_A_KIND


@pytest.mark.nightly
@pytest.mark.parametrize("version", TRITONS)
def test_every_launch_gives_the_same_with_another_triton(version: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("NYBBLE_TRITONS", ROOT / "build" / "tritons")) / version
    if not folder.is_dir():
        pytest.skip(f"Triton {version} is not in {folder.parent.name}")
    path = os.pathsep.join(map(str, (folder, Path(__file__).parent, ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", "ptx.sweep", "sm_90", "bfloat16", "float32"],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["triton"] == version
    assert found["wrong"] == []


@pytest.mark.parametrize("backwards", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_warps_may_run_in_any_order_between_barriers(
    of_several_warps: dict[str, Any], error: Callable[..., float], backwards: bool
) -> None:
    for case in of_several_warps.values():
        assert not case.is_wrong(error(case, by_warp=True, backwards=backwards)), case


def test_kernels_without_their_barriers_race(
    ptx: Callable[[str], Any], of_several_warps: dict[str, Any], error: Callable[..., float]
) -> None:
    for kernel, case in of_several_warps.items():
        if kernel not in WITHOUT_BARRIERS:
            with pytest.raises(ptx("machine").RaceError):
                error(case, lambda text: re.sub(BARRIER, "", text))


@pytest.mark.parametrize(
    "kernel",
    [
        "cross_entropy",
        "nearest_codes",
        pytest.param("search_scales", marks=pytest.mark.nightly),
        pytest.param("nested_codes", marks=pytest.mark.nightly),
    ],
)
def test_each_barrier_is_needed(
    ptx: Callable[[str], Any], shown: dict[str, Any], error: Callable[..., float], kernel: str
) -> None:
    texts: list[str] = []
    error(shown[kernel], lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    n_barriers = len(re.findall(BARRIER, texts[0]))
    assert n_barriers >= 3
    for number in range(n_barriers):
        with pytest.raises(ptx("machine").RaceError):
            error(shown[kernel], replaced(BARRIER, "", number))


@pytest.mark.parametrize(("mutation", "kernel"), [(name, kernel) for name, all_ in CAUGHT.items() for kernel in all_])
def test_a_changed_instruction_is_noticed(
    ptx: Callable[[str], Any], shown: dict[str, Any], error: Callable[..., float], mutation: str, kernel: str
) -> None:
    try:
        got = error(shown[kernel], replaced(*MUTATIONS[mutation]))
    except (ptx("machine").RaceError, ValueError, IndexError):
        return
    assert shown[kernel].is_wrong(got)


def test_a_byte_beside_a_tensor_is_an_error(
    ptx: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, shown: dict[str, Any], error: Callable[..., float]
) -> None:
    launches = ptx("launches")
    whole = launches.extent
    monkeypatch.setattr(launches, "extent", lambda tensor: max(whole(tensor) - 1, 0))
    for case in shown.values():
        with pytest.raises(IndexError, match=r"are in no tensor|lie outside of"):
            error(case)


def test_an_instruction_that_is_not_known_is_refused(shown: dict[str, Any], error: Callable[..., float]) -> None:
    with pytest.raises(NotImplementedError, match=r"dp4a"):
        error(shown["gated"], replaced(r"mul\.(rn\.)?f32", "dp4a.f32"))


def test_an_access_that_is_not_aligned_is_an_error(shown: dict[str, Any], error: Callable[..., float]) -> None:
    """NVIDIA's hardware refuses it: the address of a tensor's first byte, and one byte more."""

    def moved(text: str) -> str:
        return re.sub(r"(ld\.global\S* \t?\{[^}]*\}, \[ ?%rd\d+) ?\+ ?0 ?\]", r"\1+2]", text)

    with pytest.raises(ValueError, match=r"no multiple of 16"):
        error(shown["gated"], moved)


def test_two_values_for_one_byte_are_a_race(ptx: Callable[[str], Any]) -> None:
    machine = ptx("machine")
    held = torch.zeros(8, dtype=torch.uint8).numpy()
    region, warps = machine.Region(0, held, "bytes"), torch.tensor([0, 1], dtype=torch.int16).numpy()
    at, values = torch.tensor([[0], [0]]).numpy(), torch.tensor([[1], [2]], dtype=torch.uint8).numpy()
    with pytest.raises(machine.RaceError, match=r"different values"):
        region.store(at, values, warps)
