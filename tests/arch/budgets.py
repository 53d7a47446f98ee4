"""Size budgets: `python tests/arch/budgets.py` prints the largest pieces and one warning per piece that is over budget.

file        400 lines
function     60 lines, decorators and docstring included
arguments     7, keyword-only included; `self`, `cls`, `*args` and `**kwargs` are not counted
assignment    2 values: a line that assigns three or more unrelated values at once is harder to read than three lines

The budgets warn and never fail: a straight line of code is worth more than a number kept. Commands of the command line
and Triton kernels are not counted by arguments, because typer and Triton read theirs one by one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 7
MAX_ASSIGNED = 2
FOLDERS = ("src", "tests", "bench", "tools")
SHOWN = 10


@dataclass(frozen=True)
class Function:
    """The size of one function."""

    where: str  # "file:line name"
    lines: int
    arguments: int
    has_free_signature: bool  # False where typer or Triton decides how arguments are given


def python_files(root: Path) -> list[Path]:
    """Every module of the project's code, relative to `root`."""
    return sorted(file.relative_to(root) for folder in FOLDERS for file in (root / folder).rglob("*.py"))


def functions(file: Path, tree: ast.AST) -> Iterator[Function]:
    """Every function of a parsed file, inner ones and methods too."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        is_read_by_others = any(word in ast.unparse(node.args) for word in ("typer.", "constexpr"))
        yield Function(
            where=f"{file.as_posix()}:{first} {node.name}",
            lines=(node.end_lineno or node.lineno) - first + 1,
            arguments=len(names) - (names[:1] in (["self"], ["cls"])),
            has_free_signature=not is_read_by_others,
        )


def packed_assignments(file: Path, tree: ast.AST) -> Iterator[str]:
    """Warnings for lines such as `a, b, c = f(), 1, g()`."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Tuple)
            and isinstance(node.targets[0], ast.Tuple)
        ):
            n = len(node.value.elts)
            if n > MAX_ASSIGNED:
                yield f"{file.as_posix()}:{node.lineno} assigns {n} values in one line"


def warnings(root: Path) -> list[str]:
    """One line for everything that is over budget."""
    over = []
    for file in python_files(root):
        text = (root / file).read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(file))
        n_lines = len(text.splitlines())
        if n_lines > MAX_FILE_LINES:
            over.append(f"{file.as_posix()} has {n_lines} lines; the budget is {MAX_FILE_LINES}")
        for function in functions(file, tree):
            if function.lines > MAX_FUNCTION_LINES:
                over.append(f"{function.where} has {function.lines} lines; the budget is {MAX_FUNCTION_LINES}")
            if function.arguments > MAX_ARGUMENTS and function.has_free_signature:
                over.append(f"{function.where} takes {function.arguments} arguments; the budget is {MAX_ARGUMENTS}")
        if file.parts[0] == "src":
            over += packed_assignments(file, tree)
    return over


def table(root: Path) -> str:
    """The largest files and functions, largest first."""
    files = python_files(root)
    texts = {file: (root / file).read_text(encoding="utf-8") for file in files}
    by_lines = sorted(((len(text.splitlines()), file.as_posix()) for file, text in texts.items()), reverse=True)
    every = [function for file, text in texts.items() for function in functions(file, ast.parse(text))]
    rows = ["largest files"]
    rows += [f"  {n:>4}  {name}" for n, name in by_lines[:SHOWN]]
    rows += ["largest functions"]
    rows += [f"  {f.lines:>4}  {f.where}" for f in sorted(every, key=lambda f: (-f.lines, f.where))[:SHOWN]]
    return "\n".join(rows)


if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    sys.stdout.write("\n".join([table(ROOT), *(f"warning: {line}" for line in warnings(ROOT))]) + "\n")
