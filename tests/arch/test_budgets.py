"""The script that warns about sizes sees each kind of excess."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def test_as_a_script_it_prints_the_ten_largest_files_and_functions_and_never_fails() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0
    assert lines[0] == "largest files"
    assert lines[11] == "largest functions"
    sizes = [int(line.split()[0]) for line in lines[1:11]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(line.startswith("warning: ") for line in lines[22:])


@pytest.mark.parametrize(("n", "over"), [(400, False), (401, True)])
def test_a_long_file_is_seen(budgets: ModuleType, tmp_path: Path, n: int, over: bool) -> None:
    seen = budgets.warnings(project(tmp_path, "tools/a.py", "x = 1\n" * n))
    assert seen == (["tools/a.py has 401 lines; the budget is 400"] if over else [])


@pytest.mark.parametrize(("n", "over"), [(57, False), (58, True)])
def test_a_long_function_is_seen_with_decorator_and_docstring(
    budgets: ModuleType, tmp_path: Path, n: int, over: bool
) -> None:
    source = "class A:\n    @property\n    def f(self):\n" + '        """Doc."""\n' + "        x = 1\n" * n
    seen = budgets.warnings(project(tmp_path, "src/nybble/a.py", source))
    assert seen == (["src/nybble/a.py:2 f has 61 lines; the budget is 60"] if over else [])


@pytest.mark.parametrize(
    ("signature", "n"),
    [
        ("a, b, c, d, e, f, g", 0),
        ("a, b, c, d, e, f, g, h", 8),
        ("self, a, b, c, d, e, f, g", 0),
        ("a, /, b, c, d, *, e, f, g, h", 8),
        ("a, b, c, d, e, f, g, *args, **kwargs", 0),
        ("a, b, c, d, e, f, g, h: tl.constexpr", 0),
    ],
)
def test_too_many_arguments_are_seen(budgets: ModuleType, tmp_path: Path, signature: str, n: int) -> None:
    seen = budgets.warnings(project(tmp_path, "src/nybble/a.py", f"async def f({signature}): ...\n"))
    assert seen == ([f"src/nybble/a.py:1 f takes {n} arguments; the budget is 7"] if n else [])


def test_three_values_assigned_in_one_line_are_seen(budgets: ModuleType, tmp_path: Path) -> None:
    source = "a, b = 1, 2\na, b = b, a\nx, y, z = f()\nx, y, z = 1, f(), 3\n"
    seen = budgets.warnings(project(tmp_path, "src/nybble/a.py", source))
    assert seen == ["src/nybble/a.py:4 assigns 3 values in one line"]
