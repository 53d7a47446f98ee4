"""Size budgets, kept true: `python tests/arch/budgets.py` prints the largest pieces and one line per violation.

file       400 lines
function    60 lines, decorators and docstring included
arguments    7, keyword-only included; `self`, `cls`, `*args` and `**kwargs` are not counted
folders      one deep below src/nybble (folders of code; templates and data lie beside their module)
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
FOLDERS = ("src", "tests", "bench")
PACKAGE = Path("src/nybble")
SHOWN = 10

# Functions whose signature is somebody else's: (file, function) -> whose. An entry that is not needed is a violation.
MIRRORED_SIGNATURES = {
    ("src/nybble/kernels/ops.py", "dequantize_4bit"): "torch.library reads the operator's schema off it",
    ("src/nybble/kernels/ops.py", "gemv_4bit"): "torch.library reads the operator's schema off it",
    **{
        ("src/nybble/kernels/gpu_kernels.py", kernel): "a Triton kernel takes its pointers and sizes one by one"
        for kernel in ("dequantize", "search_scales", "nested_codes", "nearest_codes", "gemv")
    },
    **{
        ("src/nybble/kernels/gpu_row_kernels.py", kernel): "a Triton kernel takes its pointers and sizes one by one"
        for kernel in ("rms_norm", "rms_norm_backward", "dropout", "rope")
    },
    ("src/nybble/kernels/ops.py", "_"): "the fake of dequantize_4bit, whose signature must be the operator's",
}
VERBS = Path("src/nybble/cli")  # typer reads the command line's options off a verb's arguments


@dataclass(frozen=True)
class Function:
    """A function's size."""

    file: Path  # relative to the repository
    line: int
    name: str
    lines: int
    arguments: int
    is_verb: bool

    @property
    def where(self) -> str:
        """`file:line name`."""
        return f"{self.file.as_posix()}:{self.line} {self.name}"


def python_files(root: Path) -> list[Path]:
    """Every module of the project's code, relative to `root`."""
    return sorted(
        file.relative_to(root) for folder in FOLDERS for file in (root / folder).rglob("*.py") if file.is_file()
    )


def functions(root: Path, file: Path) -> Iterator[Function]:
    """Every function in a file, inner ones and methods too."""
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or node.lineno) - first + 1
            yield Function(file, first, node.name, lines, count_arguments(node), is_verb(file, node))


def count_arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Arguments that a caller gives."""
    positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    if positional[:1] in (["self"], ["cls"]):
        del positional[0]
    return len(positional) + len(node.args.kwonlyargs)


def is_verb(file: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer reads this function's arguments: a module of the command line, options `Annotated`."""
    annotations = [ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation]
    return file.parent == VERBS and any(text.startswith("Annotated[") and "typer." in text for text in annotations)


def violations(root: Path) -> list[str]:
    """One line for everything that is over budget."""
    found = []
    exempt = dict.fromkeys(MIRRORED_SIGNATURES, False)
    for file in python_files(root):
        n_lines = count_lines(root / file)
        if n_lines > MAX_FILE_LINES:
            found.append(f"{file.as_posix()}: {n_lines} lines, allowed are {MAX_FILE_LINES}")
        if file.is_relative_to(PACKAGE) and len(file.relative_to(PACKAGE).parts) > 2:
            found.append(f"{file.as_posix()}: {len(file.relative_to(PACKAGE).parts) - 1} folders deep, allowed is 1")
        for function in functions(root, file):
            if function.lines > MAX_FUNCTION_LINES:
                found.append(f"{function.where}: {function.lines} lines, allowed are {MAX_FUNCTION_LINES}")
            if function.arguments > MAX_ARGUMENTS and not function.is_verb:
                key = (file.as_posix(), function.name)
                if key in exempt:
                    exempt[key] = True
                    continue
                found.append(f"{function.where}: {function.arguments} arguments, allowed are {MAX_ARGUMENTS}")
    unused = [key for key, is_needed in exempt.items() if not is_needed and (root / key[0]).is_file()]
    found += [f"{file} {name}: its exemption in MIRRORED_SIGNATURES is not needed" for file, name in unused]
    return found


def count_lines(file: Path) -> int:
    """Lines of a file."""
    return len(file.read_text(encoding="utf-8").split("\n")) - 1


def table(root: Path) -> str:
    """The largest files and functions, largest first."""
    files = python_files(root)
    by_lines = sorted(((count_lines(root / file), file.as_posix()) for file in files), reverse=True)
    every = sorted((f for file in files for f in functions(root, file)), key=lambda f: (-f.lines, f.where))
    rows = [f"largest files (at most {MAX_FILE_LINES} lines)"]
    rows += [f"  {n:>4}  {name}" for n, name in by_lines[:SHOWN]]
    rows += [f"largest functions (at most {MAX_FUNCTION_LINES} lines, {MAX_ARGUMENTS} arguments)"]
    rows += [f"  {f.lines:>4}  {f.arguments:>2} arguments  {f.where}" for f in every[:SHOWN]]
    return "\n".join(rows)


def main(root: Path) -> int:
    """Print the table and what is over budget; 1 if anything is."""
    found = violations(root)
    sys.stdout.write("\n".join([table(root), *found]) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2]))
