"""Chat templates: named ones for tokenizers that have none, and rendering with limits on time and memory.

A template is a program written by someone else. transformers runs it in jinja's sandbox, which denies it files and
processes but lets it loop for days and multiply text until memory runs out. Here its time and memory are limited.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from nybble.errors import RowsError
from nybble.guard import brief

# The format of Llama 2: the system text is part of the first user turn.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if turn['role'] == 'assistant' %}{{ ' ' + turn['content'] + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ turn['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] }}"
    "{{ eos_token if turn['role'] == 'assistant' else '<|im_end|>' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# CPU time of this process for one rendering: a real template takes a thousandth of it, a collection of garbage that may
# run meanwhile a second.
MOST_SECONDS = 2.0
_MOST_MEMORY = 1 << 30  # bytes of address space beyond what the process already has
_MOST_CHARACTERS = 8 << 20
_MOST_TEMPLATE_BYTES = 256 << 10
_NAMED = {"inst": INST, "chatml": CHATML}
# The bytes of address space that the process had when `many_renderings` was entered; None outside of it.
_present: ContextVar[int | None] = ContextVar("_present", default=None)
_is_running: ContextVar[bool] = ContextVar("_is_running", default=False)  # a template is being rendered
_DATE = re.compile(r"strftime_now\b(?!\s+is\b)(?:\(\s*(['\"])(.*?)\1\s*\))?")  # a use; its format if it is written out
_CODES = "aAbBcCdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZf"  # letters of strftime
# `strftime_now` of the codes in `clock`; what it begins with leaves the white space of the template after it alone.
_MACRO = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(now=format | replace('%%', '\\0')) -%}"
    "{%- for code, value in clock.items() -%}{%- set text.now = text.now | replace(code, value) -%}{%- endfor -%}"
    "{{- text.now | replace('\\0', '%') -}}{%- endmacro -%}{{- '' }}"
)
_clock: ContextVar[datetime | None] = ContextVar("clock", default=None)


@contextmanager
def fixed_clock(now: datetime | None) -> Iterator[None]:
    """Within, chat templates that print the date or the time print those of `now`; None: the real ones."""
    before = _clock.set(now)
    try:
        yield
    finally:
        _clock.reset(before)


def template_clock() -> datetime:
    """The local date and time that chat templates are told."""
    return _clock.get() or datetime.now()


def clock_arguments(template: str) -> dict[str, Any]:
    """What tells `apply_chat_template` the fixed clock, if there is one and `template` uses it.

    transformers lets a template have data, but no function of ours, so the template gets a macro of that name.
    """
    now = _clock.get()
    if now is None or "strftime_now" not in template:
        return {}
    return {"chat_template": _MACRO + template, "clock": _printed(now)}


@cache
def _printed(now: datetime) -> dict[str, str]:
    return {f"%{pad}{code}": now.strftime(f"%{pad}{code}") for pad in ("", "-") for code in _CODES}


def dates_in(template: str) -> list[str]:
    """All that `template` prints of the date and the time, as it is now."""
    now = template_clock()
    return [now.strftime(form) if quote else now.isoformat() for quote, form in _DATE.findall(template)]


def find_template(name: str) -> str:
    """The template with this name, or the text of the `.jinja` file at this path.

    Raises:
        RowsError: neither exists, or the file cannot be read.
    """
    if name in _NAMED:
        return _NAMED[name]
    path = Path(name).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        raise RowsError(f"chat_template: got {name!r}; allowed: {', '.join(_NAMED)} or an existing .jinja file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(
            f"chat_template: {path} cannot be read ({brief(error)}); give a .jinja file in UTF-8"
        ) from error


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, tools: Any = None, asks: bool = False
) -> str:
    """Render a chat with the tokenizer's template; with `asks`, up to where the answer begins.

    Raises:
        RowsError: the template fails or exceeds a limit of time, memory or size; the message starts with `where`.
    """
    if len(str(tokenizer.chat_template)) > _MOST_TEMPLATE_BYTES:
        raise RowsError(
            f"{where}: the chat template has more than {_MOST_TEMPLATE_BYTES:,} characters; set --chat_template to "
            "another one"
        )
    try:
        with _in_time(), _in_memory():
            clock = clock_arguments(tokenizer.get_chat_template(tools=tools))
            text = str(
                tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=asks, **clock
                )
            )
    except _TooLongError as error:
        raise RowsError(
            f"{where}: the chat template runs for more than {MOST_SECONDS:g} s; set --chat_template to another one"
        ) from error
    except MemoryError as error:
        raise RowsError(
            f"{where}: the chat template needs more than {_MOST_MEMORY:,} bytes; set --chat_template to another one"
        ) from error
    except Exception as error:
        raise RowsError(
            f"{where}: the chat template failed: {brief(error)}; repair the row, or set --chat_template"
        ) from error
    if len(text) > _MOST_CHARACTERS:
        raise RowsError(
            f"{where}: the chat template produced {len(text):,} characters; set --chat_template to another one"
        )
    return text


class _TooLongError(Exception):
    """Raised inside a template that runs for too long."""


@contextmanager
def many_renderings() -> Iterator[None]:
    """Within, what the limits of each rendering need is prepared once, which takes a quarter of a rendering's time: the
    signal handler, and the memory that the process has."""
    if _present.get() is not None or not _can_interrupt():
        yield
        return
    former = signal.signal(signal.SIGVTALRM, _stop)
    token = _present.set(_present_bytes())
    try:
        yield
    finally:
        _present.reset(token)
        signal.signal(signal.SIGVTALRM, former)


def _can_interrupt() -> bool:
    """Only the main thread can be interrupted by a timer."""
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


@contextmanager
def _in_time() -> Iterator[None]:
    """Raise `_TooLongError` in the body after `MOST_SECONDS`, in the main thread."""
    if not _can_interrupt():
        yield
        return
    with many_renderings():
        _is_running.set(True)
        # The timer repeats because jinja swallows exceptions that are raised while it folds constants.
        signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS, MOST_SECONDS / 10)
        try:
            try:
                yield
            finally:
                _is_running.set(False)
        finally:  # a signal may have come before the flag was set
            _is_running.set(False)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextmanager
def _in_memory() -> Iterator[None]:
    """Limit the address space to `_MOST_MEMORY` above what the process has now; does nothing except on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    present = _present.get()
    wanted = (_present_bytes() if present is None else present) + _MOST_MEMORY
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _present_bytes() -> int:
    """The address space that this process has, in bytes; 0 except on Linux."""
    if sys.platform != "linux":
        return 0
    import resource

    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - may run for each rendering; a Path doubles the time
        return int(file.read().partition(b" ")[0]) * resource.getpagesize()


def _stop(_number: int, _frame: Any) -> None:
    if _is_running.get():  # a signal may still come when the timer is off
        raise _TooLongError
