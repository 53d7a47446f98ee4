"""Every setting of the schema is read somewhere: a setting that changes nothing would be a lie to its user.

The sources are read, not run. A setting counts as read where a module outside `nybble.recipe`, or its arithmetic of
batches, takes the attribute of that name from its section: as `recipe.training.seed`, or from a name that is annotated
as a section or assigned from one (`training: TrainingSection`, `section = job.recipe.training`). `model.device` of some
other model is no reading.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nybble
from nybble.recipe import Recipe, Setting, all_settings

SOURCE = Path(nybble.__file__).parent
SECTIONS = {item.section for item in all_settings() if item.section}
SECTION_OF_TYPE = {type(Recipe.model_fields[name].default).__name__: name for name in SECTIONS}


def last_name(node: ast.expr) -> str:
    """`a.b._c` -> "c"."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.lstrip("_")


def section_of(node: ast.expr, known: dict[str, set[str]]) -> set[str]:
    """The sections that an expression may stand for; "" is the recipe itself."""
    if last_name(node) == "recipe":
        return {""}
    if isinstance(node, ast.Attribute) and node.attr in SECTIONS and last_name(node.value) == "recipe":
        return {node.attr}
    return known.get(last_name(node), set())


def known_names(tree: ast.AST) -> dict[str, set[str]]:
    """Names of a module that stand for a section, by annotation or assignment."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            types = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
            found.setdefault(name.lstrip("_"), set()).update(SECTION_OF_TYPE[t] for t in types & SECTION_OF_TYPE.keys())
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name | ast.Attribute):
                    found.setdefault(last_name(target), set()).update(section_of(node.value, {}) - {""})
    return found


def settings_read(source: str) -> set[str]:
    """Paths (`training.seed`) of the settings that a module reads."""
    tree = ast.parse(source)
    known = known_names(tree)
    return {
        f"{section}.{node.attr}" if section else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        for section in section_of(node.value, known)
    }


@pytest.fixture(scope="module")
def everything_read() -> set[str]:
    computing = [SOURCE / "recipe" / name for name in ("batches.py", "pace.py")]  # with settings; they define none
    files = [file for file in SOURCE.rglob("*.py") if SOURCE / "recipe" not in file.parents or file in computing]
    return {path for file in files for path in settings_read(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("item", all_settings(), ids=lambda item: item.path)
def test_the_setting_is_read(item: Setting, everything_read: set[str]) -> None:
    assert item.path in everything_read, f"no module outside nybble.recipe reads {item.path}"


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("recipe.training.seed", "training.seed"),
        ("self._recipe.training.seed", "training.seed"),
        ("def f(section: TrainingSection): return section.seed", "training.seed"),
        ("def f(x: TrainingSection | None): return x.seed", "training.seed"),
        ("class A:\n    _part: TrainingSection\n    def f(self): return self._part.seed", "training.seed"),
        ("section = job.recipe.training\nsection.seed", "training.seed"),
        ("job.recipe.method", "method"),
    ],
)
def test_a_reading_is_found(source: str, read: str) -> None:
    assert read in settings_read(source)


@pytest.mark.parametrize(
    "source",
    [
        "tensor.seed",
        "training.seed",
        "seed = 1",
        "'recipe.training.seed'",
        "recipe.training.seed = 1",
        "recipe.evaluation.seed",
        "def f(section: DataSection): section.seed",
    ],
)
def test_what_is_no_reading_is_not_found(source: str) -> None:
    assert "training.seed" not in settings_read(source)
