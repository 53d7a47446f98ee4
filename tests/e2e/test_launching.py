"""Launchers: what begins anew, and what the processes of a run refuse together."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nybble.storage.checkpoints import list_checkpoints

Launch = Callable[..., Any]
_SECONDS = 120  # until what does not end fails its test


@pytest.mark.nightly
def test_two_machines_begin_anew_by_torchrun(words: list[object], free_port: Callable[[], int], tmp_path: Path) -> None:
    """Each launcher counts its own restarts, and their store outlives a start: neither may keep them from meeting."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=two", "-m", "nybble"]
    run = tmp_path / "run"
    words = [*words, "--num_train_epochs", 8, "--output_dir", run]
    machines, logs = [], [(tmp_path / name).open("wb") for name in ("first", "second")]
    for log in logs:
        command = [*launcher, *(str(word) for word in words)]
        machines.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + _SECONDS
        while not list_checkpoints([run / "checkpoints"]):
            assert time.monotonic() < deadline, (tmp_path / "first").read_text()
            time.sleep(0.05)
        children = [child for machine in machines for child in psutil.Process(machine.pid).children()]
        next(child for child in children if child.environ().get("RANK") == "1").kill()
        assert [machine.wait(_SECONDS) for machine in machines] == [0, 0], (tmp_path / "first").read_text()
    finally:
        for machine, log in zip(machines, logs, strict=True):
            machine.kill()
            log.close()
    said = (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    assert "another process of the run is lost" in said
    assert "continuing from" in said
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == list(range(1, events[-1]["total_steps"] + 1))


def test_one_line_begins_a_run_and_goes_on_with_it(
    nybble: Callable[..., Any], words: list[object], tmp_path: Path
) -> None:
    words = [*words, "--output_dir", tmp_path / "run"]
    assert nybble(*words, "--auto-resume").code == 0
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    learned = adapter.read_bytes()
    newest, *_ = list_checkpoints([tmp_path / "run" / "checkpoints"])
    shutil.rmtree(newest)  # as if it had been killed before the last steps
    shutil.rmtree(adapter.parent)
    again = nybble(*words, "--auto-resume")
    assert again.code == 0
    assert "continuing from" in again.err
    assert adapter.read_bytes() == learned
    assert nybble(*words).code == 2


def test_a_launcher_overwrites_with_its_first_start_alone(launch: Launch, words: list[object], tmp_path: Path) -> None:
    words = [*words, "--output_dir", tmp_path / "run", "--overwrite"]
    launcher = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert launch(1, words, launcher=launcher).codes == (0,)
    for alone, said in ((launcher, True), (None, False)):
        outcome = launch(1, words, launcher=alone)
        assert outcome.codes == (0,)
        assert ("continuing from" in outcome.err[0]) == said


def test_wrong_input_is_not_taken_for_a_run_to_go_on_with(launch: Launch, words: list[object], tmp_path: Path) -> None:
    """A folder that another launcher's run is in: refused at the first start, and at every later one."""
    words = [*words, "--max_steps", 2, "--output_dir", tmp_path / "run"]
    assert launch(1, words).codes == (0,)
    launcher = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        outcome = launch(2, words, launcher=launcher)
        assert outcome.codes == (2, 2)
        assert all("is not empty; use --overwrite, --resume" in line for line in outcome.lines)


@pytest.mark.parametrize(
    "setting",
    [("--method", "full"), ("--optim", "adafactor"), ("--init_lora_weights", "loftq"), ("--encoder", "calibrated")],
)
def test_what_does_not_work_in_shards_is_said(
    launch: Launch, words: list[object], tmp_path: Path, setting: tuple[str, str]
) -> None:
    outcome = launch(2, [*words, "--output_dir", tmp_path / "run", "--distributed", "fsdp", *setting])
    assert outcome.codes == (2, 2)
    assert all("distributed: fsdp does not work with" in line for line in outcome.lines)


WRONG: dict[str, tuple[list[object], dict[int, list[object]], str]] = {
    "batch": (["--train_batch_size", 3], {}, "train_batch_size 3 cannot be divided among 2 processes"),
    "recipes": ([], {1: ["--learning_rate", 0.5]}, "setting training.learning_rate is 0.01 in process 0 and 0.5"),
    "groups": (["--distributed", "fsdp", "--fsdp_shards", 3], {}, "2 processes do not divide into groups of that size"),
    "probe": (["--learning_rate", "probe"], {}, "probe works in one process"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_one_process_refuses_all_refuse(launch: Launch, words: list[object], tmp_path: Path, case: str) -> None:
    more, own, message = WRONG[case]
    outcome = launch(2, [*words, *more, "--output_dir", tmp_path / "run"], own)
    assert outcome.codes == (2, 2)
    assert [bool(re.search(message, line)) for line in outcome.lines] == [True, True], outcome.lines
    assert not (tmp_path / "run").exists()


def test_versions_must_be_the_same(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def other_version(rank: int) -> None:
        from nybble import preparation

        found = preparation.software_versions()
        preparation.software_versions = lambda: {**found, "torch": f"2.{rank}"}  # type: ignore[attr-defined]

    outcome = launch(2, [*words, "--output_dir", tmp_path / "run"], setup=other_version)
    assert outcome.codes == (2, 2)
    assert all("the version of torch is '2.0' in process 0 and '2.1' in process 1" in line for line in outcome.lines)


def test_rows_must_be_the_same(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def other_rows(rank: int) -> None:
        (tmp_path / str(rank)).mkdir()
        text = "".join(json.dumps({"text": f"<s>[INST] {i + rank}[/INST] It is four</s>"}) + "\n" for i in range(8))
        (tmp_path / str(rank) / "rows.jsonl").write_text(text)
        os.chdir(tmp_path / str(rank))

    words = [*words, "--dataset", "rows.jsonl", "--output_dir", tmp_path / "run"]
    outcome = launch(2, words, setup=other_rows)
    assert outcome.codes == (2, 2)
    assert all("the rows' hash is" in line and "the same recipe, files and versions" in line for line in outcome.lines)
    assert not (tmp_path / "run").exists()


def test_the_folder_must_be_shared(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def elsewhere(rank: int) -> None:
        from nybble import preparation

        preparation._SECONDS_UNTIL_VISIBLE = 0
        (tmp_path / str(rank)).mkdir()
        os.chdir(tmp_path / str(rank))

    outcome = launch(2, [*words, "--output_dir", "run"], setup=elsewhere)
    assert outcome.codes == (2, 2)
    assert all("is not the folder that process 0 writes to" in line for line in outcome.lines)
    assert not (tmp_path / "0" / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2, but"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "not a number"),
    ],
)
def test_the_launchers_variables_must_be_whole(
    nybble: Callable[..., Any], words: list[object], monkeypatch: pytest.MonkeyPatch, variables: Any, message: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = nybble(*words)
    assert outcome.code == 2
    assert re.search(f"{message}.*torchrun", outcome.err)


def test_nobody_else_comes(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def hasten(_rank: int) -> None:
        from nybble.run import rendezvous

        rendezvous._SECONDS_TO_MEET = 1

    outcome = launch(1, [*words, "--output_dir", tmp_path / "run"], setup=hasten, WORLD_SIZE="2")
    assert outcome.codes == (3,)
    assert "process 0 cannot meet the 1 others at 127.0.0.1" in outcome.lines[0]


def test_other_verbs_work_in_one_process(nybble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    outcome = nybble("plan", "--model", "llama-2-7b")
    assert outcome.code == 2
    assert "nybble plan works in one process, and WORLD_SIZE is 2" in outcome.err
