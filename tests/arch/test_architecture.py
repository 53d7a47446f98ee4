"""The page that maps the code notices walks that are not true."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "architecture_page.py"
STEP = ("training.loop:train", "")
UPDATE = ("training.loop:update", "")
BUILD = ("training.build:train_model", "")


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nybble_architecture_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_walk_is_true(page: ModuleType) -> None:
    for title, hops, limit in page.WALKS:
        page.check_walk(title, hops, limit)
    assert len(page.WALKS) == 3


@pytest.mark.parametrize(
    ("hops", "limit", "words"),
    [
        ([STEP, ("training.loop:nothing", "")], 8, "does not name nothing"),
        ([("training.loop:nothing", "")], 8, "has no nothing"),
        ([BUILD, STEP, UPDATE], 1, "enters 2 modules"),
        ([BUILD, STEP, BUILD], 8, "comes back to training.build"),
        ([UPDATE, BUILD], 8, "does not name train_model"),
    ],
)
def test_a_walk_that_is_not_true_is_noticed(
    page: ModuleType, hops: list[tuple[str, str]], limit: int, words: str
) -> None:
    with pytest.raises(LookupError, match=words):
        page.check_walk("a walk", hops, limit)


def test_the_table_has_every_package_and_module(page: ModuleType) -> None:
    on_disk = {path.stem for path in page.PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {name for rank in page.ranks() for name in rank} == on_disk - {"__init__", "__main__"}
