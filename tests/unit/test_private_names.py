"""The page of private names that Nybble touches in other libraries is complete, and each has a test that guards it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "nybble"
PAGE = ROOT / "docs" / "design" / "private-names.md"
DOCUMENTED = ("_exit", "_replace", "_fields")  # of os and of named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Names that the package defines itself."""
    found = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def foreign_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of others that a module reads, sets or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in (*own, *DOCUMENTED) or ast.unparse(node.value) == "super()":
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and any(map(is_private, (node.module or "").split("."))):
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in own:
                yield name.value


def listed() -> dict[str, tuple[set[str], str]]:
    """Name -> files and guarding test, as the page has them."""
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\|([^|]*)\|[^|]*\| `([^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {name: (set(re.findall(r"`([^`]+)`", files)), test) for name, files, test in rows}


def test_every_private_name_of_another_library_is_listed() -> None:
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SOURCE.rglob("*.py")}
    own = own_names(trees)
    found = {
        (name, file.relative_to(SOURCE).as_posix())
        for file, tree in trees.items()
        if not file.is_relative_to(SOURCE / "bundled")
        for name in foreign_names(tree, own)
    }
    assert found - {(name, file) for name, (files, _) in listed().items() for file in files} == set()


def test_every_listed_name_is_used_and_guarded() -> None:
    assert len(listed()) > 10
    for name, (files, guard) in listed().items():
        for file in files:
            assert re.search(rf"\b{re.escape(name)}\b", (SOURCE / file).read_text(encoding="utf-8")), (name, file)
        file, _, test = guard.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), guard
