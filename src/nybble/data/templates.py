"""Chat templates: those for tokenizers that bring none, by name, and rendering whatever a tokenizer brings.

A template is a program of somebody else's. transformers runs it in jinja's sandbox, which keeps it from files and
processes but lets it loop for days and multiply text until memory ends; here it gets a few seconds and a few hundred
megabytes.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nybble.errors import RowsError
from nybble.guard import brief

# Llama-2's form: the system text goes into the first user turn.
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
MOST_SECONDS = 0.5  # of this process' own time, for one rendering; a real one takes a thousandth of it
_MOST_MEMORY = 1 << 30  # bytes beyond what the process has
_MOST_CHARACTERS = 8 << 20
_MOST_TEMPLATE_BYTES = 256 << 10
_NAMED = {"inst": INST, "chatml": CHATML}


def find_template(name: str) -> str:
    """The template called `name`, or the text of the `.jinja` file at `name`.

    Raises:
        RowsError: neither exists.
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
    """The chat as the tokenizer's template puts it; `asks`: up to where the answer begins.

    Raises:
        RowsError: the template fails, takes too long, or makes too much; the message starts with `where`.
    """
    if len(str(tokenizer.chat_template)) > _MOST_TEMPLATE_BYTES:
        raise RowsError(
            f"{where}: the chat template has more than {_MOST_TEMPLATE_BYTES:,} characters; set --chat_template to "
            "another one"
        )
    try:
        with _in_time(), _in_memory():
            text = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks))
    except _TooLongError as error:
        raise RowsError(
            f"{where}: the chat template runs for more than {MOST_SECONDS:g} s; set --chat_template to another one"
        ) from error
    except MemoryError as error:
        raise RowsError(
            f"{where}: the chat template takes more than {_MOST_MEMORY:,} bytes; set --chat_template to another one"
        ) from error
    except Exception as error:
        raise RowsError(
            f"{where}: the chat template refuses it: {brief(error)}; repair the row, or set --chat_template"
        ) from error
    if len(text) > _MOST_CHARACTERS:
        raise RowsError(
            f"{where}: the chat template makes {len(text):,} characters; set --chat_template to another one"
        )
    return text


class _TooLongError(Exception):
    """Raised inside a template that does not end."""


@contextmanager
def _in_time() -> Iterator[None]:
    """Within: an end comes after `MOST_SECONDS`. Of threads the main one alone can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    former = signal.signal(signal.SIGVTALRM, _stop)
    # Again and again: jinja swallows what is raised while it folds constants.
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS, MOST_SECONDS / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


@contextmanager
def _in_memory() -> Iterator[None]:
    """Within: memory ends `_MOST_MEMORY` above what the process has, on Linux, where that can be said."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - once a rendering, and a Path doubles its time
        present = int(file.read().partition(b" ")[0]) * resource.getpagesize()
    wanted = present + _MOST_MEMORY
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(_number: int, _frame: Any) -> None:
    raise _TooLongError
