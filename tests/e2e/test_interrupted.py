"""Runs that are interrupted from outside: signals, kills, disks that refuse."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.run.directory import read_record
from nybble.storage.checkpoints import list_checkpoints, verify

ROOT = Path(__file__).parents[2]
SETTINGS = {"device": "cpu", "eval_fraction": 0, "logging_steps": 1, "save_steps": 5, "max_steps": 4000}


def words(base: Path, rows: Path, out: Path, **changes: object) -> list[str]:
    settings = {"model_name_or_path": base, "dataset_name": rows, "output_dir": out, **SETTINGS, **changes}
    return ["train", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def has_checkpoints(out: Path) -> None:
    deadline = time.monotonic() + 120
    while not list_checkpoints([out / "checkpoints"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint_whole(
    tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "nybble", *words(tiny_llama(), rows_file, out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    has_checkpoints(out)
    process.send_signal(signal.SIGSTOP)  # or it might end between the two signals
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "nybble: stopped at once; the last checkpoint is whole"
    verify(list_checkpoints([out / "checkpoints"])[0])


def started(python: Path, base: Path, rows: Path, out: Path, **streams: Any) -> subprocess.Popen[str]:
    """A training that has logged steps and saves nothing unless it is told to."""
    command = [str(python), "-m", "nybble", *words(base, rows, out, save_steps=4000)]
    process = subprocess.Popen(command, text=True, **{"stderr": subprocess.PIPE, **streams})
    deadline = time.monotonic() + 120
    while not (out / "events.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def status(out: Path) -> str:
    return str(read_record(out)["status"])


@pytest.mark.parametrize("second", [signal.SIGHUP, None])
def test_a_terminal_that_closes_saves_and_ends_the_training(
    forking: Path, tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path, second: signal.Signals | None
) -> None:
    """The shell and the kernel both send SIGHUP: the second is no wish to end at once."""
    out = tmp_path / "run"
    process = started(forking, tiny_llama(), rows_file, out)
    assert status(out) == "running"
    process.send_signal(signal.SIGHUP)
    if second:
        time.sleep(0.002)
        process.send_signal(second)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "SIGHUP at step" in err.splitlines()[-1]
    assert status(out) == "stopped"
    step = json.loads((out / "events.jsonl").read_text().splitlines()[-1])["step"]
    newest = list_checkpoints([out / "checkpoints"])[0]
    verify(newest)
    assert int(newest.name.removeprefix("checkpoint-").split(".")[0]) >= step


def test_a_hang_up_that_nohup_ignores_stays_ignored(
    forking: Path, tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = (
            "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from nybble.cli.main import main; main()"
        )
        command = [str(forking), "-c", program, *words(tiny_llama(), rows_file, out, max_steps=60, save_steps=4000)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    deadline = time.monotonic() + 120
    while not (out / "events.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert status(out) == "done"


def test_a_run_whose_process_is_gone_is_called_killed(
    nybble: Callable[..., Any], forking: Path, tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    base, out = tiny_llama(), tmp_path / "run"
    process = started(forking, base, rows_file, out)
    process.kill()
    process.communicate(timeout=120)
    deadline = time.monotonic() + 10
    while status(out) == "running":  # the process dies a moment after the one that stands in its place
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert status(out) == "killed"
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert nybble("report", out).code == 0
    assert "killed: it is not finished, and its process is gone" in (out / "report.md").read_text()
    refused = nybble("ask", out, "What is one?", "--device", "cpu")
    assert refused.code == 2
    assert "its process was killed: continue it with nybble train --resume" in refused.err
    done = nybble(*words(base, rows_file, out, max_steps=2, save_steps=4000), "--resume")
    assert done.code == 0, done.err
    assert "ended without a word: it was killed, or the machine went down" in done.err
    assert status(out) == "done"


@pytest.mark.parametrize("streams", ["stderr", "stdout and stderr", "a terminal", "a full disk"])
def test_output_that_nobody_reads_is_dropped(
    forking: Path, tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path, streams: str
) -> None:
    reader, writer = pty.openpty() if streams == "a terminal" else os.pipe()
    if streams == "a full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    command = [
        forking,
        "-m",
        "nybble",
        *words(tiny_llama(), rows_file, tmp_path / "run", max_steps=40, save_steps=4000),
    ]
    stdout = writer if streams == "stdout and stderr" else subprocess.PIPE
    process = subprocess.Popen([*command, "--json"], text=True, stdout=stdout, stderr=writer)
    os.close(writer)
    if streams != "a full disk":
        os.read(reader, 1)
    os.close(reader)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert status(tmp_path / "run") == "done"
    assert stdout == writer or json.loads(out)["status"] == "done"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_outside_the_training_ends_as_ctrl_c_does(name: str) -> None:
    program = (
        "import os, signal, sys; from nybble.cli import main; "
        f"main.app.command('wait')(lambda: os.kill(os.getpid(), signal.{name})); "
        "sys.argv = ['nybble', 'wait']; main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 130
    assert done.stderr == "nybble: stopped at once; the last checkpoint is whole\n"


def test_the_command_line_resumes_refuses_and_goes_on_by_force(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    base, out = tiny_llama(), tmp_path / "run"
    stopped = nybble(*words(base, rows_file, out, max_seconds=0.001))
    assert stopped.code == 4, stopped.err
    assert "max_seconds at step 1 of 4000: saved; continue with --resume" in stopped.err.splitlines()[-1]
    refused = nybble(*words(base, rows_file, out, max_steps=6, learning_rate=1e-3), "--resume")
    assert refused.code == 2
    assert "training.max_steps (was 4000, is 6), training.learning_rate (was 0.0002, is 0.001)" in refused.err
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    forced = nybble(*words(base, rows_file, out, max_steps=6, learning_rate=1e-3), "--resume", "--force", "--json")
    assert forced.code == 0, forced.err
    assert "continuing by force, although this differs" in forced.err
    assert forced.json["status"] == "done"


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_base_that_was_fitted_to_the_rows_is_kept_for_the_resumed_run(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path, init: str
) -> None:
    settings = {"encoder": "calibrated", "init_lora_weights": init, "max_steps": 6, "eval_fraction": 0.2}
    straight, out = tmp_path / "straight", tmp_path / "run"
    undisturbed = nybble(*words(tiny_llama(), rows_file, straight, **settings), "--json")
    assert undisturbed.code == 0, undisturbed.err
    assert nybble(*words(tiny_llama(), rows_file, out, **settings, max_seconds=0.001)).code == 4
    done = nybble(*words(tiny_llama(), rows_file, out, **settings), "--resume", "--json")
    assert done.code == 0, done.err
    for name in ("loss", "n_tokens"):
        assert done.json["evaluation_base"][name] == undisturbed.json["evaluation_base"][name]
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (straight / adapter).read_bytes()
    assert done.json["eval_loss"] == undisturbed.json["eval_loss"]


def test_resume_before_the_first_checkpoint_begins_anew(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    base, out = tiny_llama(), tmp_path / "run"
    assert nybble(*words(base, rows_file, out, max_steps=2)).code == 0
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "adapter")
    done = nybble(*words(base, rows_file, out, max_steps=2), "--resume")
    assert done.code == 0, done.err
    assert "no checkpoint found; starting from step 0" in done.err
    assert [json.loads(line)["step"] for line in (out / "events.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("children", ["forked", pytest.param("new", marks=[pytest.mark.fresh, pytest.mark.nightly])])
def test_a_run_can_be_checked_on_the_users_machine(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path, children: str
) -> None:
    out = tmp_path / "run"
    assert nybble(*words(tiny_llama(), rows_file, out, max_steps=2, gradient_accumulation_steps=4)).code == 0
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    done = nybble("resume-check", out, "--steps", 24, "--json")
    assert done.code == 0, done.err
    assert done.json["identical"] is True
    assert done.json["interruptions"]
    assert done.json["n_tensors"] > 20
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before
    assert nybble("resume-check", tmp_path).code == 2


def run_tool(name: str, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tools.{name}.run", *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.nightly
def test_thirty_kills_change_nothing() -> None:
    found = run_tool("chaos", "--kills", "30", "--seed", "1")
    assert found["kills"] >= 30
    assert found["identical"] == found["runs"]


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and a compiler")
def test_no_refused_write_loses_anything() -> None:
    found = run_tool("faults", "--every", "61")
    assert found["runs"] >= 10
    assert found["lost"] == []
