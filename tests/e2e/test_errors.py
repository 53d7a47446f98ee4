"""Wrong input ends in one line and the right exit code, and leaves nothing behind: every line of `errors.yaml`."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nybble.cli.main import run as run_nybble

BESIDE = Path(__file__).parent
TABLE: dict[str, dict[str, tuple[int, str]]] = yaml.safe_load((BESIDE / "errors.yaml").read_text(encoding="utf-8"))
CASES = {command: told for group in TABLE.values() for command, told in group.items()}


@pytest.fixture(scope="module")
def spoiled(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., Path],
    machine: Callable[[Path], AbstractContextManager[None]],
) -> Iterator[Path]:
    """The folder in which the commands are typed."""
    here = tmp_path_factory.mktemp("spoiled")
    good_rows = here / "good.jsonl"
    good_rows.write_text(
        "".join(f'{{"text": "<s>[INST] What is {i}? [/INST] It is {i}. </s>"}}\n' for i in range(40)), encoding="utf-8"
    )
    makers: dict[str, Any] = runpy.run_path(str(BESIDE / "spoiled.py"))
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, machine(cache):
        patch.chdir(here)
        patch.setenv("NYBBLE_CACHE", str(cache))
        makers["spoil_all"](here, tiny_llama(), good_rows)
        makers["spoil_runs"](here, run_nybble)
        yield here


@pytest.mark.parametrize("command", CASES)
def test_one_line_the_right_code_and_nothing_left(nybble: Callable[..., Any], spoiled: Path, command: str) -> None:
    if "--device cuda" in command and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    code, message = CASES[command]
    before = set(spoiled.rglob("*"))
    done = nybble(*shlex.split(command))
    last = done.err.strip().splitlines()[-1]
    pattern = ".+".join(re.escape(part) for part in message.split("…"))
    assert re.fullmatch(f"nybble: {pattern}", last), last
    assert done.code == code
    assert "Traceback" not in done.err
    assert done.out == ""
    assert set(spoiled.rglob("*")) == before


def test_the_table_is_long_and_says_what_to_do() -> None:
    assert len(CASES) >= 80
    told = re.compile(r"; |allowed|[Dd]id you mean|see nybble --help")
    assert [message for _code, message in CASES.values() if not told.search(message)] == []


def test_debug_shows_the_traceback(nybble: Callable[..., Any]) -> None:
    done = nybble("train", "nowhere.yaml", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err


def test_what_would_steer_the_terminal_is_written_out(nybble: Callable[..., Any]) -> None:
    done = nybble("train", "\x1b[2Jevil\u202e.yaml")
    assert "\x1b" not in done.err
    assert r"\x1b[2Jevil\u202e.yaml" in done.err


def test_a_token_is_not_repeated(nybble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    token = "hf_" + "a" * 30
    done = nybble("train", "--model", f"./{token}", "--dataset_name", "./0123456789abcdef.jsonl")
    assert done.code == 2
    assert token not in done.err
    done = nybble("data", "--model", "./0123456789abcdef")
    assert "0123456789abcdef" not in done.err
