"""Files of driver and wheels are read as they are written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nybble.diagnostics.machine import gfx_name, parse_torch_build, version_tuple


@pytest.mark.parametrize(
    ("number", "name"), [(90010, "gfx90a"), (110501, "gfx1151"), (90402, "gfx942"), (120001, "gfx1201")]
)
def test_the_drivers_numbers_are_read(number: int, name: str) -> None:
    assert gfx_name(number) == name


@pytest.mark.parametrize(
    ("text", "rocm"),
    [
        ("__version__ = '2.12.0+rocm7.2'\nhip: Optional[str] = '7.2.26015'\nrocm: Optional[str] = '7.2.0'\n", (7, 2)),
        ("__version__ = '2.9.0+rocm6.4'\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482'\n", (6, 4)),
        ("__version__ = '2.9.0+rocm7.1.1'\nhip: Optional[str] = None\n", (7, 1)),
        ("__version__ = '2.14.0'\nhip: Optional[str] = '7.15.60850'\n", (10, 0)),
        ("__version__ = '2.13.0+cpu'\nhip: Optional[str] = None\n", ()),
    ],
)
def test_a_wheel_says_what_it_was_built_for(text: str, rocm: tuple[int, ...]) -> None:
    build = parse_torch_build(text)
    assert build is not None
    assert build.rocm_version == rocm
    assert build.is_rocm == bool(rocm)


def test_a_file_that_is_no_version_is_none() -> None:
    assert parse_torch_build("nothing here") is None


def test_rocm_10_comes_after_rocm_7() -> None:
    assert version_tuple("10.0+x") > version_tuple("7.2.1")


def test_this_machine_is_read_without_torch() -> None:
    code = (
        "import sys; from nybble.diagnostics.machine import Machine; m = Machine.here(); m.amd_gpus, m.driver, "
        "m.holders(), m.kernel_messages(); assert m.torch.version; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
