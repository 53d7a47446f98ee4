"""The clock of chat templates: what they print, in every process, and what the cache of rows keys on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nybble.data import Prepared, fixed_clock, render_chat
from nybble.data.templates import dates_in
from nybble.run.directory import clock_of
from nybble.run.record import Silent
from nybble.storage.cache import Cache

THEN = datetime(2025, 2, 3, 4, 5, 6)
CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2025"),
        ('{% if strftime_now is defined %}{{ strftime_now( "%H:%M" ) }}{% endif %}', "04:05"),
        ("{% set tell = strftime_now %}{{ tell('%j') }}", "034"),
        ("\n {{ strftime_now('%-d. %B, %I%p, %A %F 100%%d') }}", "\n 3. February, 04AM, Monday 2025-02-03 100%d"),
        ("{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}{{ day('%y') }}", "25"),
    ],
)
def test_templates_print_the_fixed_clock(tok: Any, template: str, printed: str) -> None:
    tok.chat_template = template
    with fixed_clock(THEN):
        assert render_chat(tok, CHAT, "row 1") == printed
        with fixed_clock(THEN.replace(year=2024, day=4, minute=9)):
            assert render_chat(tok, CHAT, "row 1") not in ("", printed)
        assert render_chat(tok, CHAT, "row 1") == printed
    real = datetime.now().year
    tok.chat_template = "{{ strftime_now('%Y') }}"
    assert abs(int(render_chat(tok, CHAT, "row 1")) - real) <= 1


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ messages }}", []),
        ("{% if strftime_now is defined %}{% endif %}", []),
        ("{{ strftime_now('%d %b') }}{{ strftime_now(\"%Y\") }}", ["03 Feb", "2025"]),
        ("{% set tell = strftime_now %}", ["2025-02-03T04:05:06"]),
        ("{{ strftime_now(form) }}", ["2025-02-03T04:05:06"]),
    ],
)
def test_the_dates_of_a_template_are_found(template: str, found: list[str]) -> None:
    with fixed_clock(THEN):
        assert dates_in(template) == found


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_every_process_prints_it_and_the_cache_keys_on_what_is_printed(
    prepare: Callable[..., Prepared], tok: Any, tmp_path: Path
) -> None:
    tok.chat_template = (
        "{% for m in messages %}{{ strftime_now('%d %b') + ' ' + m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": [*turns, {"role": "user", "content": str(i)}, turns[1]]} for i in range(600)]

    def texts(now: datetime) -> tuple[set[str], bool]:
        told = Told()
        with fixed_clock(now):
            done = prepare(rows, cache=Cache("rows", 1 << 30), watch=told, dataset_num_proc=2)
        found = {tok.decode(done.train[i].input_ids)[:9] for i in range(0, 600, 100)}
        return found, any("loaded from the cache" in note for note in told.notes)

    assert texts(THEN) == ({"<s>03 Feb"}, False)
    assert texts(THEN.replace(hour=9)) == ({"<s>03 Feb"}, True)  # another hour of the same day
    assert texts(THEN.replace(day=4)) == ({"<s>04 Feb"}, False)


def test_the_clock_of_a_run_is_read_from_its_record() -> None:
    assert clock_of({"clock": "2025-02-03T04:05:06", "started": "2026-01-01T00:00:00+00:00"}) == THEN
    older = clock_of({"started": "2026-01-01T12:00:00+00:00"})
    assert older is not None
    assert (older.tzinfo, older.astimezone().timestamp()) == (None, 1767268800)
    assert clock_of({"clock": None, "started": "yesterday"}) is None
