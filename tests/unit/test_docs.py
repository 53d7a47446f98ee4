"""Links of the documentation lead somewhere, and the commands and files that it names exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"python -m ((?:bench|tools)\.[\w.]*\w)")
NAMED = re.compile(r"\b((?:docs|bench|tools|tests)/[\w./-]+\.(?:py|md|svg|c|yaml|json))\b")
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    assert broken(page) == []


def test_links_that_lead_nowhere_are_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading, with `code`\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#a-heading-with-code) [b](other.md#b) [c](none.md) [d](https://example.org/none)\n")
    assert broken(page) == ["other.md#b", "none.md"]


def test_every_program_that_a_page_names_exists() -> None:
    named = {module for page in PAGES for module in MODULE.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 15
    assert [module for module in named if find_spec(module) is None] == []


def test_every_file_that_is_named_exists() -> None:
    files = [file for file in (*PAGES, *SOURCES) if file.name != "CHANGELOG.md"]  # which names what there was
    named = {name: file for file in files for name in NAMED.findall(file.read_text(encoding="utf-8"))}
    assert len(named) > 30
    assert {name: file for name, file in named.items() if not (ROOT / name).exists()} == {}
