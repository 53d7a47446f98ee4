"""Pages from the templates beside this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from nybble.reporting.ledger import ledger_lines


def fill(name: str, content: Mapping[str, Any]) -> str:
    """The template `name`, e.g. "report.html", with `content` in its places."""
    environment = Environment(
        loader=PackageLoader("nybble.reporting"),
        # Answers and prompts are anybody's text: in the page they are never markup.
        autoescape=select_autoescape(("html", "html.jinja"), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{name}.jinja").render(content)


def rows_page(source: str, ledger: Mapping[str, Any], rows: Sequence[Any]) -> str:
    """One self-contained page: the ledger, and rows (`data.ShownRow`) with what is learned in them set off."""
    return fill("rows.html", {"source": source, "ledger": ledger_lines(ledger), "rows": rows})
