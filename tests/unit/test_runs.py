"""Run directories: when one may be written, and what a crash can leave behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nybble.errors import InputError
from nybble.run.directory import RunDirectory, read_lines, read_record
from nybble.run.record import RunRecord, Sample, StepEvent
from nybble.storage.atomic import append_lines, atomic_folder, write_text


def event(step: int, loss: float = 1.0) -> StepEvent:
    return StepEvent(step, 9, loss, 1e-4, 0.5, 100 * step, 0.5 * step, 1000)


def record() -> RunRecord:
    return RunRecord("running", {"method": "qlora"}, {}, {"name": "cpu"}, {}, {}, {}, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def former(run: RunDirectory) -> RunDirectory:
    """A finished run with two checkpoints."""
    run.write_record(record())
    for step in (20, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (run.checkpoints / f"checkpoint-{step}" / "weights").write_text("x")
    (run.path / "link").symlink_to(run.checkpoints)
    return run


def tree(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*")}


def refusal(path: Path, **flags: bool) -> str:
    with pytest.raises(InputError) as caught:
        RunDirectory.check(path, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_folder_is_made_only_by_create(tmp_path: Path) -> None:
    checked = RunDirectory.check(tmp_path / "a" / "b")
    assert tree(tmp_path) == set()
    checked.create()
    assert tree(tmp_path) == {"a", "a/b"}


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    RunDirectory.check(tmp_path).create()
    assert tree(tmp_path) == set()


def test_a_path_in_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory.check("~/runs/x").path == tmp_path / "runs" / "x"


def test_a_folder_with_anything_in_it_is_not_written_into(former: RunDirectory, tmp_path: Path) -> None:
    assert "is not empty; use --overwrite, --resume, or another --output_dir" in refusal(former.path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".hidden").write_text("")
    assert "is not empty" in refusal(tmp_path / "mine")


def test_overwrite_only_replaces_a_former_run(former: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    assert "no run.json; --overwrite only replaces an earlier run" in refusal(tmp_path / "thesis", overwrite=True)
    assert tree(tmp_path / "thesis") == {"chapter.tex"}
    before = tree(former.path)
    checked = RunDirectory.check(former.path, overwrite=True)
    assert tree(former.path) == before
    checked.create(overwrite=True)
    assert tree(former.path) == set()


def test_overwrite_does_not_follow_links_out_of_the_run(former: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    (former.path / "out").symlink_to(tmp_path / "elsewhere")
    RunDirectory.check(former.path, overwrite=True).create(overwrite=True)
    assert tree(tmp_path / "elsewhere") == {"kept"}


@pytest.mark.parametrize("n_done", range(6))
@pytest.mark.parametrize("way", ["create", "discard"])
def test_a_removal_that_is_interrupted_leaves_what_can_be_overwritten(
    former: RunDirectory, monkeypatch: pytest.MonkeyPatch, way: str, n_done: int
) -> None:
    removed, remove = [], Path.unlink

    def unlink(path: Path, *, missing_ok: bool = False) -> None:
        if len(removed) == n_done:
            raise KeyboardInterrupt
        removed.append(path.name)
        remove(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        try:
            former.discard() if way == "discard" else former.create(overwrite=True)
        except KeyboardInterrupt:
            assert former.holds_run
            RunDirectory.check(former.path, overwrite=True)
        else:
            assert not former.holds_run


def test_create_without_overwrite_removes_nothing(former: RunDirectory) -> None:
    before = tree(former.path)
    RunDirectory.check(former.path, resume=True).create()
    assert tree(former.path) == before


def test_resume_needs_a_checkpoint(run: RunDirectory, tmp_path: Path) -> None:
    for path in (run.path, tmp_path / "none"):
        assert "has no checkpoint to resume from" in refusal(path, resume=True)
    (run.checkpoints / "checkpoint-best").mkdir(parents=True)
    assert "has no checkpoint to resume from" in refusal(run.path, resume=True)


def test_the_last_checkpoint_is_that_of_the_highest_step(former: RunDirectory) -> None:
    last = former.last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-100"  # not checkpoint-20, which is the last by name


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}])
@pytest.mark.parametrize("below", ["x", "x/y"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_done(
    tmp_path: Path, below: str, flags: dict[str, bool]
) -> None:
    (tmp_path / "file").write_text("content")
    assert "cannot be written" in refusal(tmp_path / "file" / below, **flags)
    with pytest.raises(InputError, match="cannot be written \\(Not a directory\\); choose another"):
        RunDirectory(tmp_path / "file" / below).create()
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_file_is_no_run_directory(tmp_path: Path, flags: dict[str, bool]) -> None:
    (tmp_path / "file").write_text("content")
    assert str(tmp_path / "file") in refusal(tmp_path / "file", **flags)


def test_a_file_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    write_text(tmp_path / "f", "new ü\n")
    assert (tmp_path / "f").read_bytes() == "new ü\n".encode()
    assert tree(tmp_path) == {"f"}


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "f", "old")

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "f", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"


def test_a_record_reads_back_as_written(run: RunDirectory) -> None:
    written = record()
    written.notes.append("naïve 😀")
    run.write_record(written)
    with run.held():
        assert read_record(run.path) == written.to_json()
    assert read_record(run.path) == {**written.to_json(), "status": "killed"}  # nobody runs it
    assert read_record(str(run.path))["run_dir"] == str(run.path)


def test_a_folder_without_record_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run directory \(no run.json\)"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"recipe": {', b"\xff\xfe", b"[]", b'{"status": "done"}', b"null"])
def test_a_damaged_record_is_named(run: RunDirectory, content: bytes) -> None:
    (run.path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=r"run.json is damaged \(") as caught:
        read_record(run.path)
    assert "\n" not in str(caught.value)


def test_events_and_samples_are_added_line_by_line(run: RunDirectory) -> None:
    for step in (1, 2):
        run.append_event(event(step))
    run.append_sample(Sample("was ü?\n", None, "ja", step=3))
    assert [line["step"] for line in read_lines(run.path / "events.jsonl")] == [1, 2]
    assert read_lines(run.path / "samples.jsonl") == [
        {"prompt": "was ü?\n", "base": None, "tuned": "ja", "expected": None, "step": 3}
    ]


def test_a_line_cut_short_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b'{"step": 1}\n\n{"step": 2}\n[3]\n{"step": 4, "x": "\xc3')
    assert read_lines(tmp_path / "e") == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "none") == []


def test_a_resumed_run_forgets_the_steps_it_will_repeat(run: RunDirectory) -> None:
    for step in (1, 2, 3, 4):
        run.append_event(event(step))
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run.drop_lines_after(2)
    assert [line["step"] for line in read_lines(run.path / "events.jsonl")] == [1, 2]
    run.append_event(event(3))
    assert [line["step"] for line in read_lines(run.path / "events.jsonl")] == [1, 2, 3]


def test_the_manifest_holds_size_and_hash_of_every_file_of_the_result(former: RunDirectory) -> None:
    (former.adapter).mkdir()
    (former.adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (former.path / "tensorboard").mkdir()
    (former.path / "tensorboard" / "events").write_text("x")
    (former.path / "link").unlink()
    former.write_manifest()
    former.write_manifest()  # not of itself
    manifest = json.loads((former.path / "manifest.json").read_text())
    assert sorted(manifest) == ["adapter/adapter_model.safetensors", "run.json"]
    for name, entry in manifest.items():
        content = (former.path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_overwrite_and_resume_together_are_refused(former: RunDirectory) -> None:
    assert "--resume" in refusal(former.path, overwrite=True, resume=True)


def test_a_sample_may_hold_unicode_line_separators(run: RunDirectory) -> None:
    run.append_sample(Sample("p", "a\u2028b", "c\x85d"))
    assert [line["base"] for line in read_lines(run.path / "samples.jsonl")] == ["a\u2028b"]


def test_a_line_added_behind_one_cut_short_is_read(run: RunDirectory) -> None:
    (run.path / "samples.jsonl").write_text('{"prompt": "cut')
    run.append_sample(Sample("p", "a", "b"))
    assert [line["prompt"] for line in read_lines(run.path / "samples.jsonl")] == ["p"]


def test_a_loss_that_is_not_a_number_is_still_json(run: RunDirectory) -> None:
    run.append_event(event(1, loss=float("nan")))
    assert "NaN" not in (run.path / "events.jsonl").read_text()


def test_a_crash_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "f", "new")
    assert tree(tmp_path) == set()


def test_a_line_that_had_to_wait_is_written_with_the_record(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run.warn = said.append

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run.append_event(event(1))
    monkeypatch.setattr("nybble.run.directory.append_lines", full)
    run.append_event(event(2))
    run.append_event(event(3))
    run.write_record(record())  # refused again, and still kept
    monkeypatch.undo()
    run.write_record(record())
    assert [line["step"] for line in read_lines(run.path / "events.jsonl")] == [1, 2, 3]
    assert [text.partition("events.jsonl")[2] for text in said] == [
        ": No space left on device; its lines are kept until it can be written"
    ]
    monkeypatch.setattr("nybble.run.directory.append_lines", full)
    run.append_event(event(4))
    run.write_manifest()
    assert said[-1].endswith("events.jsonl: No space left on device; its last lines are lost: 1")


def test_only_one_process_writes_a_run(run: RunDirectory) -> None:
    with run.held(), pytest.raises(InputError, match="being written by another process"), RunDirectory(run.path).held():
        pass
    with RunDirectory(run.path).held():
        pass


def test_what_a_killed_process_left_is_no_run_and_goes(tmp_path: Path) -> None:
    (tmp_path / ".run.json.7.tmp").write_text("{")
    (tmp_path / ".adapter.7.partial").mkdir()
    (tmp_path / ".adapter.7.partial" / "x").write_text("")
    RunDirectory.check(tmp_path).create()
    assert tree(tmp_path) == set()


def test_a_run_that_was_killed_before_its_first_checkpoint_is_resumed_from_its_beginning(run: RunDirectory) -> None:
    run.write_record(record())
    RunDirectory.check(run.path, resume=True)
    run.adapter.mkdir()  # the result of a run whose checkpoints were removed must not be lost
    assert "has no checkpoint" in refusal(run.path, resume=True)


def test_a_folder_takes_the_place_of_the_former_only_when_it_is_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "a") as folder:
        os.link(folder.parent / "a" / "x", folder.parent / "a" / "x")
    assert tree(tmp_path) == {"a", "a/x"}
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "y").write_text("new")
    assert tree(tmp_path) == {"a", "a/y"}


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half of a line and then no more."""
    append_lines(tmp_path / "e", [b"1\n"])
    write, calls = io.FileIO.write, 0

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise OSError(28, "No space left on device")
            return write(self, content[: len(content) // 2])

    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Full(self, "a+"))
    with pytest.raises(OSError, match="No space"):
        append_lines(tmp_path / "e", [b"second\n"])
    monkeypatch.undo()
    assert (tmp_path / "e").read_bytes() == b"1\n"


def test_a_process_that_does_not_write_leaves_the_directory_alone(former: RunDirectory, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in former.path.rglob("*")}
    reader = RunDirectory.check(former.path, resume=True, writes=False)
    with reader.held(), former.held():  # a reader takes no lock
        reader.create(overwrite=True)
        written = record()
        reader.write_record(written)
        reader.append_event(event(1))
        reader.append_sample(Sample("p", None, "a"))
        reader.write_mask([])
        reader.drop_lines_after(0)
        reader.write_manifest()
        reader.discard()
    assert {file: file.stat().st_mtime_ns for file in former.path.rglob("*")} == before
    assert written.run_dir == str(former.path)
    unborn = RunDirectory.check(tmp_path / "none", writes=False)
    with unborn.held():
        unborn.create()
    assert not unborn.path.exists()
