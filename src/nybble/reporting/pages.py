"""Pages from the templates beside this file."""

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
    """The template `name`, e.g. "report.html", with `content` in its places."""
    is_markdown = name.endswith(".md")
    environment = Environment(
        loader=PackageLoader("nybble.reporting"),
        # Answers, prompts, names and notes are anybody's text: in a page they are never markup.
        autoescape=not is_markdown,  # noqa: S701 - Markdown has its own escapes
        finalize=in_markdown if is_markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"verbatim": _verbatim, "code": _code}
    return environment.get_template(f"{name}.jinja").render(content)


class _Verbatim(str):
    """Markdown that is to stand as it is."""

    __slots__ = ()


def _verbatim(text: Any) -> str:
    """A block of code: four spaces before each line, whatever ends a line."""
    return _Verbatim("\n".join(f"    {line}" for line in str(text).splitlines()))


def _code(text: Any) -> str:
    """What stands between backticks, where nothing else is read as markup."""
    return _Verbatim(" ".join(str(text).split()).replace("`", "'"))


def in_markdown(value: Any) -> str:
    """Text on one line, in which neither HTML, links, code nor borders of a table are read."""
    if isinstance(value, _Verbatim):
        return value
    text = " ".join(str(value).split())
    return re.sub(r"[&<>|`\[\]]", lambda found: f"&#{ord(found[0])};", text)


@contextmanager
def of_record(file: Path) -> Iterator[None]:
    """Within, a record is read that may be anybody's: what it lacks, or holds as something else, is said to be damage.

    Raises:
        InputError: `file` is damaged.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else "a part is of another kind than it was written"
        raise InputError(f"{file}: damaged ({what}); give another folder") from error


def rows_page(source: str, ledger: Mapping[str, Any], rows: Sequence[Any]) -> str:
    """One self-contained page: the ledger, and rows (`data.ShownRow`) with what is learned in them set off."""
    return fill("rows.html", {"source": source, "ledger": ledger_lines(ledger), "rows": rows})
