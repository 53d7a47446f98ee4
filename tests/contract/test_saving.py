"""Checkpoints beside a training: what a disk that refuses does to it, what is kept, what ends it early."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nybble.errors import CannotRunError, InputError, StoppedError
from nybble.storage import checkpoints
from nybble.storage.checkpoints import Place, list_checkpoints, prune_checkpoints, verify, write_checkpoint
from nybble.training import loop
from nybble.training.checkpoint import CheckpointWriter, Snapshot
from nybble.training.stopping import Stops

World = Callable[..., Any]
Left = Callable[[Path], dict[str, Any]]
Compare = Callable[[dict[str, Any], dict[str, Any]], None]
Refuse = Callable[..., None]
FILES = [("state.json", b"{}"), ("weights.safetensors", b"x" * 100)]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """`refuse(error, below, first, last)`: writes of a checkpoint's files under a folder fail, from the n-th on."""
    write = checkpoints._write

    def arm(error: OSError, below: Path, first: int = 1, last: int = 10**9) -> None:
        seen = 0

        def refusing(file: Path, content: bytes) -> dict[str, Any]:
            nonlocal seen
            if below in file.parents:
                seen += 1
                if first <= seen <= last:
                    file.write_bytes(content[: len(content) // 2])
                    raise error
            return write(file, content)

        monkeypatch.setattr(checkpoints, "_write", refusing)

    return arm


def names(out: Path) -> list[str]:
    return [path.name for path in list_checkpoints([out / "checkpoints"])]


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_and_training_goes_on(
    world: World, refuse: Refuse, everything: Left, assert_same: Compare, tmp_path: Path
) -> None:
    made = world(save_steps=2)
    made.train(tmp_path / "straight")
    refuse(FULL, tmp_path / "out", first=6, last=7)  # the second checkpoint and the third
    made.train(tmp_path / "out")
    good = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    for name in ("checkpoint-4", "checkpoint-6"):
        why = f"({good.parent}: No space left on device); training continues, the last good one is {good}"
        assert f"{name} could not be written {why}" in made.said
    assert names(tmp_path / "out") == ["checkpoint-7", "checkpoint-2"]
    assert_same(everything(tmp_path / "out"), everything(tmp_path / "straight"))
    assert not list(tmp_path.rglob("*.partial"))


def test_an_optimizer_that_no_checkpoint_can_hold_is_found_at_the_second_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, made = torch.optim.AdamW.step, []

    def odd(self: torch.optim.AdamW, *given: Any, **named: Any) -> Any:
        made.append(update(self, *given, **named))
        for state in self.state.values():
            state["projector"] = object()
        return made[-1]

    monkeypatch.setattr(torch.optim.AdamW, "step", odd)
    with pytest.raises(CannotRunError, match=r"optim adamw_\w+: optimizer\.state\.0\.projector is a builtins\.object"):
        world(save_steps=1000).train(tmp_path / "out")
    assert len(made) == 1


def test_a_spare_folder_takes_what_the_disk_refuses_and_is_resumed_from(
    world: World, refuse: Refuse, stopped: Callable[..., Path], everything: Left, tmp_path: Path
) -> None:
    made = world(save_steps=1, spare_dir=str(tmp_path / "spare"))
    made.train(tmp_path / "straight")
    out = tmp_path / "out"
    refuse(OSError(errno.EIO, "Input/output error"), out, first=6)
    stopped(made, out, at=8)
    assert names(out) == []  # the limit of two is one for both folders
    spared = [path.name for path in list_checkpoints([tmp_path / "spare" / "out"])]
    assert spared == ["checkpoint-3.1", "checkpoint-3"]
    assert any("Input/output error; checkpoint-2 is in" in text for text in made.said)
    refuse(FULL, tmp_path / "nowhere")
    made.train(out, resume=True)
    assert f"continuing from {tmp_path / 'spare' / 'out' / 'checkpoint-3.1'}" in made.said
    assert [e["loss"] for e in everything(out)["events"]] == [
        e["loss"] for e in everything(tmp_path / "straight")["events"]
    ]


def test_a_stop_that_cannot_be_saved_says_so(
    world: World, refuse: Refuse, stop_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    made = world(save_steps=1)
    refuse(FULL, tmp_path, first=6)
    stop_after(8)
    with pytest.raises(CannotRunError, match=r"SIGTERM at step 3 of 7, and its state could not be saved \(.*No space"):
        made.train(tmp_path / "out")
    assert names(tmp_path / "out") == ["checkpoint-1"]


@pytest.fixture
def minute_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every step takes a minute."""
    minutes = 0

    def at_a_steps_end() -> float:
        nonlocal minutes
        minutes += 1
        return 60.0 * minutes

    monkeypatch.setattr("nybble.training.loop.time", SimpleNamespace(monotonic=at_a_steps_end))
    monkeypatch.setattr("nybble.training.checkpoint.time", SimpleNamespace(monotonic=lambda: 60.0 * minutes))


@pytest.mark.usefixtures("minute_a_step")
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_minutes": 3}, [7, 6, 3]),
        ({"save_minutes": 3, "save_steps": 2}, [7, 6, 4, 2]),  # the time counts from the latest checkpoint
        ({"save_minutes": 2.5, "save_strategy": "epoch"}, [7, 6, 3]),
        ({"save_minutes": 5, "save_strategy": "epoch"}, [7, 6, 3]),
        ({"save_minutes": 0}, [7]),
        ({"save_minutes": 1, "save_strategy": "no"}, []),
    ],
)
def test_a_checkpoint_is_written_when_there_was_none_for_save_minutes(
    world: World, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    world(save_total_limit=9, **settings).train(tmp_path)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in steps]


def test_what_is_saved_by_time_changes_nothing_and_is_resumed_from(
    world: World, everything: Left, assert_same: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(save_minutes=0).train(tmp_path / "straight")
    made, step = world(save_minutes=1e-9), loop.clip_gradients
    made.train(tmp_path / "saved")
    assert_same(everything(tmp_path / "saved"), everything(tmp_path / "straight"))

    def die(t: Any) -> Any:
        if t.state.step == 4:
            raise ZeroDivisionError
        return step(t)

    monkeypatch.setattr(loop, "clip_gradients", die)
    with pytest.raises(ZeroDivisionError):
        made.train(tmp_path / "out")
    monkeypatch.setattr(loop, "clip_gradients", step)
    assert names(tmp_path / "out")[0] == "checkpoint-4"
    made.train(tmp_path / "out", resume=True)
    assert_same(everything(tmp_path / "out"), everything(tmp_path / "straight"))


@pytest.mark.parametrize("at", [8, None])
def test_the_last_checkpoint_is_tried_once_more(
    world: World, refuse: Refuse, stop_after: Callable[[int | None], None], tmp_path: Path, at: int | None
) -> None:
    """Nothing newer comes after it, so a disk that was full for a moment must not cost what it holds."""
    made = world(save_steps=1)
    before, last = ("checkpoint-3", "checkpoint-3.1") if at else ("checkpoint-6", "checkpoint-7")
    first = 5 * 3 + 1 if at else 5 * 6 + 1  # a checkpoint has five files
    refuse(FULL, tmp_path / "out", first, last=first)
    stop_after(at)
    if at:
        with pytest.raises(StoppedError, match="saved; continue with --resume"):
            made.train(tmp_path / "out")
    else:
        made.train(tmp_path / "out")
    assert names(tmp_path / "out") == [last, before]
    assert sum("could not be written" in text for text in made.said) == 1


def test_a_folder_that_vanishes_is_made_again(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, out = world(save_steps=1, logging_steps=1), tmp_path / "out"
    write = checkpoints.write_checkpoint

    def vanish(parent: Path, place: Place, files: Any) -> Path:
        if place.step == 3:
            (tmp_path / "out").rename(tmp_path / "gone")
        return write(parent, place, files)

    monkeypatch.setattr("nybble.training.checkpoint.write_checkpoint", vanish)
    made.train(out)
    assert names(out) == ["checkpoint-7", "checkpoint-6"]


def test_the_last_good_one_stays_until_the_next_is_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk that takes every write and gives back something else."""
    first = write_checkpoint(tmp_path, Place(1), FILES)
    write = checkpoints._write

    def lossy(file: Path, content: bytes) -> dict[str, Any]:
        line = write(file, content)
        file.write_bytes(b"y" * len(content))
        return line

    monkeypatch.setattr(checkpoints, "_write", lossy)
    with pytest.raises(OSError, match="what was read back differs from what was written"):
        write_checkpoint(tmp_path, Place(2), FILES)
    assert list_checkpoints([tmp_path]) == [first]
    verify(first)


def test_pruning_keeps_the_newest_and_leaves_what_was_abandoned(tmp_path: Path) -> None:
    for place in (Place(2), Place(4), Place(4, 1), Place(9)):
        write_checkpoint(tmp_path, place, FILES)
    newest = write_checkpoint(tmp_path, Place(6), FILES)
    prune_checkpoints([tmp_path], newest, 3, damaged=[tmp_path / "checkpoint-4"])
    assert [path.name for path in list_checkpoints([tmp_path])] == ["checkpoint-6", "checkpoint-4.1", "checkpoint-2"]


def test_there_is_one_write_at_a_time_and_training_does_not_wait_for_it(tmp_path: Path) -> None:
    held, writing, most = threading.Event(), 0, 0

    def identity() -> dict[str, Any]:
        nonlocal writing, most
        writing += 1
        most = max(most, writing)
        held.wait(10)
        writing -= 1
        return {}

    writer = CheckpointWriter([tmp_path], 5, lambda _: None, identity=identity)
    snapshots = [Snapshot(Place(n), {}, "weights", {}, {}, {}) for n in (1, 2, 3)]
    writer.write(snapshots[0])
    assert list_checkpoints([tmp_path]) == []  # and yet `write` is back
    threading.Timer(0.1, held.set).start()
    writer.write(snapshots[1])
    writer.write(snapshots[2])
    writer.finish()
    assert most == 1
    assert [path.name for path in list_checkpoints([tmp_path])] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]


def test_what_a_writing_thread_meets_that_no_disk_did_is_raised(tmp_path: Path) -> None:
    writer = CheckpointWriter([tmp_path], 2, lambda _: None, identity=lambda: {}["missing"])
    writer.write(Snapshot(Place(1), {}, "weights", {}, {}, {}))
    with pytest.raises(KeyError, match="missing"):
        writer.finish()


def test_weights_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    said: list[str] = []
    writer = CheckpointWriter([tmp_path], 2, said.append)
    writer.write(Snapshot(Place(1), {"a": torch.tensor([1.0, float("nan")])}, "weights", {}, {}, {}))
    writer.finish()
    assert list_checkpoints([tmp_path]) == []
    assert "its weights are not finite" in said[0]


def test_a_limit_of_time_saves_before_it(
    world: World, monkeypatch: pytest.MonkeyPatch, everything: Left, assert_same: Compare, tmp_path: Path
) -> None:
    made = world()
    made.train(tmp_path / "straight")
    now, look = [time.monotonic()], Stops._look

    def a_second_later(self: Stops) -> None:
        now[0] += 1.0
        look(self)

    monkeypatch.setattr("nybble.training.stopping.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Stops, "_look", a_second_later)
    with pytest.raises(StoppedError, match="max_seconds at step 2 of 7: saved"):
        made.train(tmp_path / "out", max_seconds=6.5)
    assert names(tmp_path / "out") == ["checkpoint-2"]  # six micro-batches; the seventh would end after the limit
    monkeypatch.undo()
    made.train(tmp_path / "out", resume=True)
    assert_same(everything(tmp_path / "out"), everything(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.AcceleratorError("HIP error: unspecified launch failure\nmore"),
            "is lost (HIP error: unspecified launch failure)",
        ),
        (
            RuntimeError("CUDA error: device-side assert triggered"),
            "is lost (CUDA error: device-side assert triggered)",
        ),
        (torch.OutOfMemoryError("HIP out of memory"), "out of memory on"),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), "out of memory on"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of memory on",
        ),
        (RuntimeError("could not create a primitive"), "out of memory on"),
        (MemoryError("std::bad_alloc"), "out of memory on"),
    ],
)
def test_a_lost_device_names_the_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    made, forward_backward = world(save_steps=2), loop.forward_backward

    def lose(t: loop.Training, *arguments: Any) -> Any:
        if t.state.step == 5:
            raise error
        return forward_backward(t, *arguments)

    monkeypatch.setattr(loop, "forward_backward", lose)
    with pytest.raises(CannotRunError) as caught:
        made.train(tmp_path / "out")
    assert said in str(caught.value)
    assert str(caught.value).endswith(
        f"continue from {tmp_path / 'out' / 'checkpoints' / 'checkpoint-4'} with --resume"
    )


def test_any_other_fault_is_raised_as_it_is(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop, "forward_backward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        world().train(tmp_path / "out")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """`spoil({step: factor})`: the loss of a step, and with it its gradient, is multiplied."""

    def arm(factors: dict[int, float]) -> None:
        loss_of = loop.loss_of

        def spoiled(t: loop.Training, *arguments: Any) -> Any:
            loss, figures = loss_of(t, *arguments)
            return loss * factors.get(t.state.step + 1, 1.0), figures

        monkeypatch.setattr(loop, "loss_of", spoiled)

    return arm


def test_a_loss_that_is_no_number_stops_with_the_rows_and_the_last_good_checkpoint(
    world: World, spoil: Callable[[dict[int, float]], None], tmp_path: Path
) -> None:
    made = world(save_steps=1)
    spoil({4: float("nan")})
    with pytest.raises(InputError) as caught:
        made.train(tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("the loss is not a number at step 4 (rows ")
    rows = message.partition("(rows ")[2].partition(")")[0].split(", ")
    assert len({int(row) for row in rows}) == 6
    assert set(rows) == rows_of_step_4(made)
    assert message.endswith(f"continue from {tmp_path / 'out' / 'checkpoints' / 'checkpoint-3'} with --resume")
    assert names(tmp_path / "out") == ["checkpoint-3", "checkpoint-2"]


def rows_of_step_4(made: Any) -> set[str]:
    """The first six of the second epoch, by torch and accelerate's rule."""
    order = torch.randperm(14, generator=torch.Generator().manual_seed(made.recipe.training.seed + 1)).tolist()
    return {str(made.prepared.train[place].row) for place in order[:6]}


def test_bad_batches_are_skipped_and_counted_where_the_recipe_says_so(
    world: World, spoil: Callable[[dict[int, float]], None], everything: Left, tmp_path: Path
) -> None:
    made = world(save_steps=1, save_total_limit=9, bad_batch="skip", logging_steps=1)
    spoil({4: float("inf")})
    done = made.train(tmp_path / "out")
    assert done.skipped_steps == 1
    assert done.steps == 7
    assert any(text.startswith("the loss is not a number at step 4 (rows") for text in made.said)
    before, after = (tmp_path / "out" / "checkpoints" / f"checkpoint-{n}" / "adapter_model.safetensors" for n in (3, 4))
    assert before.read_bytes() == after.read_bytes()
    events = everything(tmp_path / "out")["events"]
    assert [event["step"] for event in events] == [1, 2, 3, 5, 6, 7]
    assert all(event["loss"] is not None for event in events)


def test_a_spike_of_the_gradient_is_a_bad_batch(
    world: World, spoil: Callable[[dict[int, float]], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nybble.training.guards._FEWEST_NORMS", 3)
    spoil({6: 1e5})
    made = world()
    with pytest.raises(InputError, match=r"the gradient's norm is .* times the usual at step 6 \(rows"):
        made.train(tmp_path / "out")
    assert made.train(tmp_path / "never", grad_spike=0).steps == 7
    assert made.train(tmp_path / "skipped", bad_batch="skip").skipped_steps == 1


def test_events_wait_for_a_disk_that_is_full_for_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nybble.run import directory

    append, calls = directory.append_lines, 0

    def full_for_a_while(file: Path, lines: Any) -> None:
        nonlocal calls
        calls += 1
        if 2 <= calls <= 4:
            raise FULL
        append(file, lines)

    monkeypatch.setattr(directory, "append_lines", full_for_a_while)
    made = world(logging_steps=1)
    made.train(tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert sum("its lines are kept" in text for text in made.said) == 1
