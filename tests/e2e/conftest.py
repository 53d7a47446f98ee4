"""Runs of the command line, in this process or in several."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nybble import subprocesses
from nybble.cli.main import run as run_nybble
from tools.forking import forking_python

_SECONDS = 300  # until a process that does not end fails its test
ROWS = 23  # of which steps of 4 leave 3 in the last, which neither 2 nor 4 processes share evenly
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which must be one JSON object and nothing else."""
        return json.loads(self.out)


@pytest.fixture
def nybble(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`nybble("train", ...)` as if typed."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = run_nybble([str(word) for word in words])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(autouse=True)
def _cache(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[[Path], AbstractContextManager[None]],
) -> Iterator[None]:
    """A cache of each test's own that knows this machine."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("NYBBLE_CACHE", str(cache))
    with machine(cache):
        yield


@pytest.fixture(scope="session")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program that does what `python` does, in a process forked from one that has imported the libraries."""
    with forking_python(tmp_path_factory.mktemp("forking") / "python") as program:
        yield program


@pytest.fixture(autouse=True)
def _children_are_forked(request: pytest.FixtureRequest, forking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreters that Nybble starts take no seconds to import; those of tests marked `fresh` are new ones."""
    if not request.node.get_closest_marker("fresh"):
        monkeypatch.setattr(subprocesses, "sys", SimpleNamespace(executable=str(forking)))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """40 rows in [INST] form, of which the same question always has the same answer."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"text": f"<s>[INST] What is {NUMBERS[i % 8]}? [/INST] It is {NUMBERS[(i + 1) % 8]}. </s>", "answer": "x"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@dataclass(frozen=True)
class Ending:
    """How the processes of a run ended, by rank."""

    codes: tuple[int | None, ...]
    err: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The errors."""
        return [line for text in self.err for line in text.splitlines() if line.startswith("nybble: ")]


@pytest.fixture(scope="session")
def libraries() -> None:
    """Read before the processes are forked, so that none of them has to."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import nybble.pipeline
    import nybble.training.build  # noqa: F401


@pytest.fixture
def launch(tmp_path: Path, libraries: None) -> Callable[..., Ending]:
    """`launch(2, words)`: `nybble words` in two processes, named as torchrun does it.

    They are forked from this one, which has read the libraries already. `launcher`: its store, as torchrun keeps one.
    """

    def call(
        count: int,
        words: Sequence[object],
        own: Mapping[int, Sequence[object]] | None = None,
        setup: Callable[[int], None] = lambda _rank: None,
        launcher: torch.distributed.TCPStore | None = None,
        **variables: str,
    ) -> Ending:
        port = launcher.port if launcher else _free_port()
        context = multiprocessing.get_context("fork")
        started = []
        for rank in range(count):
            named: dict[str, object] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
            }
            named |= {"LOCAL_WORLD_SIZE": count, "MASTER_PORT": str(port)}
            named |= {"TORCHELASTIC_USE_AGENT_STORE": launcher is not None}
            environment = {**{k: str(v) for k, v in named.items()}, **variables}
            ours = [str(word) for word in (*words, *((own or {}).get(rank, ())))]
            file = tmp_path / f"err-{rank}"
            started.append(context.Process(target=_process, args=(rank, environment, ours, file, setup)))
        for process in started:
            process.start()
        for process in started:
            process.join(_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        return Ending(
            tuple(process.exitcode for process in started),
            tuple((tmp_path / f"err-{rank}").read_text() for rank in range(count)),
        )

    return call


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A port of this machine that nobody listens on."""
    return _free_port


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _process(
    rank: int, environment: dict[str, str], words: list[str], file: Path, setup: Callable[[int], None]
) -> None:
    os.environ.update(environment)
    with file.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        setup(rank)
        code = run_nybble(words)
        sys.stderr.flush()
    os._exit(code)


@pytest.fixture
def words(tiny_llama: Callable[..., Path], tmp_path: Path) -> list[object]:
    """A training of three epochs in float32, where rows differ in length."""
    rows = tmp_path / "rows.jsonl"
    texts = [f"<s>[INST] {'What is two? ' * (1 + i % 4)}[/INST] It is {'four ' * (1 + i % 3)}</s>" for i in range(ROWS)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        "model": tiny_llama(),
        "dataset": rows,
        "eval_fraction": 0,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "train_batch_size": 4,  # the same steps on any number of processes
        "compute_dtype": "float32",
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 4,
        "save_total_limit": 9,
        "dataset_num_proc": 1,
        "device": "cpu",
        "report_to": "none",
    }
    return ["train", *(word for name, value in settings.items() for word in (f"--{name}", value))]
