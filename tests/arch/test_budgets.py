"""The size budgets hold, and the script that checks them sees each kind of violation."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("budgets.py")


@pytest.fixture(scope="module")
def budgets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nybble_budgets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def project(root: Path, file: str, content: str) -> Path:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(content, encoding="utf-8")
    return root


def test_the_project_keeps_its_budgets(budgets: ModuleType) -> None:
    assert budgets.violations(ROOT) == []


def test_run_as_a_script_it_prints_the_ten_largest_files_and_functions() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("largest files")
    assert lines[11].startswith("largest functions")
    sizes = [int(line.split()[0]) for line in lines[1:11]]
    assert sizes == sorted(sizes, reverse=True)
    assert done.returncode == int(len(lines) > 22)


@pytest.mark.parametrize("folder", ["src/nybble", "tests", "bench"])
@pytest.mark.parametrize(("n", "over"), [(400, False), (401, True)])
def test_a_long_file_is_seen(budgets: ModuleType, tmp_path: Path, folder: str, n: int, over: bool) -> None:
    found = budgets.violations(project(tmp_path, f"{folder}/a.py", "x = 1\n" * n))
    assert found == ([f"{folder}/a.py: 401 lines, allowed are 400"] if over else [])


@pytest.mark.parametrize(("n", "over"), [(57, False), (58, True)])
def test_a_long_function_is_seen_with_decorator_and_docstring(
    budgets: ModuleType, tmp_path: Path, n: int, over: bool
) -> None:
    source = "class A:\n    @property\n    def f(self):\n" + '        """Doc."""\n' + "        x = 1\n" * n
    found = budgets.violations(project(tmp_path, "src/nybble/a.py", source))
    assert found == (["src/nybble/a.py:2 f: 61 lines, allowed are 60"] if over else [])


@pytest.mark.parametrize(
    ("signature", "n"),
    [
        ("a, b, c, d, e, f, g", 0),
        ("a, b, c, d, e, f, g, h", 8),
        ("self, a, b, c, d, e, f, g", 0),
        ("cls, a, b, c, d, e, f, g, h", 8),
        ("a, /, b, c, d, *, e, f, g, h", 8),
        ("a, b, c, d, e, f, g, *args, **kwargs", 0),
    ],
)
def test_too_many_arguments_are_seen(budgets: ModuleType, tmp_path: Path, signature: str, n: int) -> None:
    found = budgets.violations(project(tmp_path, "src/nybble/a.py", f"async def f({signature}): ...\n"))
    assert found == ([f"src/nybble/a.py:1 f: {n} arguments, allowed are 7"] if n else [])


def test_a_verbs_options_are_not_counted(budgets: ModuleType, tmp_path: Path) -> None:
    options = ", ".join(f"{name}: Annotated[str, typer.Option()]" for name in "abcdefgh")
    assert budgets.violations(project(tmp_path, "src/nybble/cli/go.py", f"def go({options}): ...\n")) == []
    assert budgets.violations(project(tmp_path, "src/nybble/data/go.py", f"def go({options}): ...\n")) != []


def test_an_exemption_that_is_not_needed_is_seen(budgets: ModuleType, tmp_path: Path) -> None:
    found = budgets.violations(project(tmp_path, "src/nybble/kernels/ops.py", "def dequantize_4bit(a): ...\n"))
    assert "src/nybble/kernels/ops.py dequantize_4bit: its exemption in MIRRORED_SIGNATURES is not needed" in found


def test_a_folder_in_a_folder_is_seen(budgets: ModuleType, tmp_path: Path) -> None:
    assert budgets.violations(project(tmp_path, "src/nybble/data/a.py", "")) == []
    found = budgets.violations(project(tmp_path, "src/nybble/data/more/a.py", ""))
    assert found == ["src/nybble/data/more/a.py: 2 folders deep, allowed is 1"]


def test_a_violation_makes_the_script_fail(
    budgets: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert budgets.main(project(tmp_path, "src/nybble/a.py", "")) == 0
    assert budgets.main(project(tmp_path, "bench/b.py", "x = 1\n" * 500)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "bench/b.py: 500 lines, allowed are 400"
