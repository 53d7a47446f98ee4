"""Variables are changed where the GPU needs it, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.diagnostics.environment import prepare
from nybble.diagnostics.machine import Machine, TorchBuild

ROCM = TorchBuild("2.12.0+rocm7.1", "7.1", "7.1", None)
FLAG = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"


def machine(root: Path, gfx_target_version: int, environ: dict[str, str], build: TorchBuild = ROCM) -> Machine:
    node = root / "sys/class/kfd/kfd/topology/nodes/1"
    node.mkdir(parents=True, exist_ok=True)
    (node / "properties").write_text(f"simd_count 8\ngfx_target_version {gfx_target_version}\n")
    return Machine(root, environ, {}, build)


@pytest.mark.parametrize(
    ("version", "gfx"), [(110001, "gfx1101"), (110003, "gfx1103"), (110500, "gfx1150"), (120000, "gfx1200")]
)
def test_flash_attention_that_is_held_back_is_asked_for(version: int, gfx: str, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    (said,) = prepare(environ, machine(tmp_path, version, environ))
    assert environ == {FLAG: "1"}
    assert FLAG in said
    assert gfx in said
    assert prepare(environ, machine(tmp_path, version, environ)) == []


@pytest.mark.parametrize(
    ("rocm", "version", "is_set"), [("7.2", 120001, True), ("7.0", 120001, False), ("7.2", 110000, False)]
)
def test_products_that_read_past_their_end_are_avoided(rocm: str, version: int, is_set: bool, tmp_path: Path) -> None:
    build = TorchBuild(f"2.12.0+rocm{rocm}", rocm, rocm, None)
    environ = {"ROCBLAS_USE_HIPBLASLT": "1"}
    said = prepare(environ, machine(tmp_path, version, environ, build))
    assert environ.get("TORCH_BLAS_PREFER_HIPBLASLT") == ("0" if is_set else None)
    assert environ["ROCBLAS_USE_HIPBLASLT"] == "1"  # the user's
    assert bool(said) == is_set


@pytest.mark.parametrize("version", [90010, 90402, 110000, 110501, 120001])
def test_where_it_is_not_needed_nothing_is_set(version: int, tmp_path: Path) -> None:
    environ = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    assert prepare(environ, machine(tmp_path, version, environ)) == []
    assert environ == {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}


def test_what_the_user_has_said_stays(tmp_path: Path) -> None:
    environ = {FLAG: "0"}
    assert prepare(environ, machine(tmp_path, 110001, environ)) == []
    assert environ == {FLAG: "0"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("expandable_segments:True", None),
        ("max_split_size_mb:64, expandable_segments:True", "max_split_size_mb:64"),
        ("expandable_segments:False", "expandable_segments:False"),
    ],
)
def test_segments_that_hang_are_taken_out(before: str, after: str | None, tmp_path: Path) -> None:
    environ = {"PYTORCH_HIP_ALLOC_CONF": before}
    said = prepare(environ, machine(tmp_path, 110000, environ))
    assert environ.get("PYTORCH_HIP_ALLOC_CONF") == after
    assert bool(said) == (before != after)


def test_other_builds_are_left_alone(tmp_path: Path) -> None:
    environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    build = TorchBuild("2.12.0+cu128", None, None, "12.8")
    assert prepare(environ, machine(tmp_path, 110001, environ, build)) == []
    assert prepare(environ) == []  # torch is imported in this process
    assert environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
