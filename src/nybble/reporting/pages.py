"""Render pages from the templates in this package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from nybble.errors import InputError
from nybble.reporting.ledger import ledger_lines


def fill(name: str, content: Mapping[str, Any]) -> str:
    """Render the template `name`, for example "report.html", with `content`."""
    is_markdown = name.endswith(".md")
    environment = Environment(
        loader=PackageLoader("nybble.reporting"),
        # Answers, prompts, names and notes are untrusted text, so a page never treats them as markup.
        autoescape=not is_markdown,  # noqa: S701 - Markdown has its own escapes
        finalize=in_markdown if is_markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"verbatim": _verbatim, "code": _code}
    return environment.get_template(f"{name}.jinja").render(content)


class _Verbatim(str):
    """Markdown that must not be escaped."""

    __slots__ = ()


def _verbatim(text: Any) -> str:
    """The text as a block of code: four spaces before each line, whatever character ends the line."""
    return _Verbatim("\n".join(f"    {line}" for line in str(text).splitlines()))


def _code(text: Any) -> str:
    """The text as it may appear between backticks, on one line and without backticks of its own."""
    return _Verbatim(" ".join(str(text).split()).replace("`", "'"))


def in_markdown(value: Any) -> str:
    """The text on one line, escaped so that it contains no HTML, links, code or table borders."""
    if isinstance(value, _Verbatim):
        return value
    text = " ".join(str(value).split())
    return re.sub(r"[&<>|`\[\]]", lambda match: f"&#{ord(match[0])};", text)


@contextmanager
def of_record(file: Path) -> Iterator[None]:
    """Report a missing or malformed part of an untrusted record, which the body reads, as damage of `file`.

    Raises:
        InputError: `file` is damaged.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else "a value has the wrong type"
        raise InputError(f"{file} is damaged ({what}); give another folder") from error


def rows_page(source: str, ledger: Mapping[str, Any], rows: Sequence[Any]) -> str:
    """One self-contained page with the ledger and rows (`data.ShownRow`) in which learned tokens are highlighted."""
    return fill("rows.html", {"source": source, "ledger": ledger_lines(ledger), "rows": rows})
