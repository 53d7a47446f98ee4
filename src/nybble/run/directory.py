"""The run directory: everything that a run leaves on disk.

    run.json          resolved recipe, versions, device, rows, plan, figures, status
    recipe.yaml       only the resolved recipe; `nybble train recipe.yaml` repeats the run
    mask.jsonl        some rows, and which of their tokens are trained on
    events.jsonl      one line per logged step
    held_out.jsonl    one line per held-out row: its loss before and after training
    samples.jsonl     prompts with the answers of the base and of the tuned model
    checkpoints/      checkpoint-N, see `nybble.storage.checkpoints`
    adapter/          the adapter as PEFT saves it (method full: model/)
    report.html report.md report.json
    manifest.json     size and SHA-256 of every file above, checkpoints left out; written last

A file is replaced as a whole (`nybble.storage.atomic`): a reader sees either the old or the new content. Of several
processes that train together, one writes the directory and the others only read it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from nybble.errors import InputError
from nybble.guard import parse_object, read_object, redact
from nybble.run.record import Evaluation, RunRecord, Sample, StepEvent
from nybble.storage.atomic import append_lines, is_left_over, remove_left_overs, write_text
from nybble.storage.checkpoints import list_checkpoints
from nybble.storage.manifest import MANIFEST, entries_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_P = ParamSpec("_P")


def _only_by_writer(
    method: Callable[Concatenate[RunDirectory, _P], None],
) -> Callable[Concatenate[RunDirectory, _P], None]:
    """Make a method do nothing in a process that does not write the directory."""

    @wraps(method)
    def call(self: RunDirectory, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if self.writes:
            method(self, *args, **kwargs)

    return call


class RunDirectory:
    """The folder of one run."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        """Nothing is read or written yet.

        Args:
            path: the folder; it need not exist.
            writes: whether this process writes it. Otherwise all methods that write do nothing.
        """
        self.path = path
        self.writes = writes
        self.warn: Callable[[str], None] = lambda _text: None  # called with a message when lines cannot be written
        self._waiting: dict[str, list[bytes]] = {}  # file -> lines that could not be written yet

    @classmethod
    def check(
        cls,
        path: Path | str,
        *,
        overwrite: bool = False,
        resume: bool = False,
        elsewhere: bool = False,
        writes: bool = True,
    ) -> RunDirectory:
        """A directory that a run may be written into; nothing is changed before `create`.

        Args:
            path: the folder; it need not exist.
            overwrite: whether the content may be removed, if it is an earlier run.
            resume: whether the run is resumed from a checkpoint in it.
            elsewhere: whether another folder has a checkpoint of the run.
            writes: whether this process writes it.

        Raises:
            InputError: the folder has content and neither flag is given, there is nothing to resume, or the folder
                cannot be written.
        """
        run = cls(Path(path).expanduser(), writes=writes)
        is_taken = run.path.exists() and not (
            run.path.is_dir() and all(is_left_over(path) for path in run.path.iterdir())
        )
        if resume and run.last_checkpoint() is None and not (elsewhere or run.is_begun):
            raise InputError(f"{run.path} has no checkpoint to resume from; remove --resume to start over")
        if overwrite and resume:
            raise InputError("--overwrite removes the run that --resume would continue; give one of them")
        if is_taken and not (overwrite or resume):
            raise InputError(f"output_dir {run.path} is not empty; use --overwrite, --resume, or another --output_dir")
        if is_taken and overwrite and not run.holds_run:
            raise InputError(f"{run.path} has files but no run.json; --overwrite only replaces an earlier run")
        existing = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"output_dir {run.path} cannot be written ({existing} is not writable); choose another")
        return run

    @_only_by_writer
    def create(self, *, overwrite: bool = False) -> None:
        """Create the folder; with `overwrite`, remove the earlier run in it.

        Raises:
            InputError: the system refuses.
        """
        try:
            if overwrite and self.path.exists():
                # Interrupted, it must leave what is known as a run, and so can be overwritten or resumed.
                for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == "run.json"):
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            remove_left_overs(self.path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"output_dir {self.path} cannot be written ({error.strerror}); choose another")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold a lock, so that only one command writes the run. Without locks in the file system, it holds nothing.

        Raises:
            InputError: another command is writing the run, or the folder cannot be created.
        """
        if not self.writes:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if fcntl is not None:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(folder)
            raise InputError(f"{self.path} is being written by another process; wait for it or stop it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        try:
            yield
        finally:
            os.close(folder)

    @_only_by_writer
    def discard(self) -> None:
        """Remove the files of a run that failed before training, so that they do not block the next attempt."""
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)  # of its tracker; what stays blocks nothing else
        for name in ("mask.jsonl", "recipe.yaml", "run.json"):  # run.json last, as in `create`
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def full_model(self) -> Path:
        return self.path / "model"

    @property
    def base(self) -> Path:
        """The 4-bit base, saved when packing the original again would not give the same bytes."""
        return self.path / "base"

    @property
    def holds_run(self) -> bool:
        """Whether there is a run in it, finished or not."""
        return (self.path / "run.json").is_file()

    @property
    def is_begun(self) -> bool:
        """Whether there is a run in it that has not produced weights yet."""
        return self.holds_run and not (self.adapter.exists() or self.full_model.exists())

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, which may be damaged."""
        return next(iter(list_checkpoints([self.checkpoints])), None)

    def write_record(self, record: RunRecord) -> None:
        """Write run.json, and lines of other files that could not be written before."""
        record.run_dir = str(self.path)
        self._write_record(record)

    @_only_by_writer
    def _write_record(self, record: RunRecord) -> None:
        for name in self._waiting:
            self._write_waiting(name)
        write_text(self.path / "run.json", f"{to_json(record.to_json(), indent=2)}\n")

    @_only_by_writer
    def append_event(self, event: StepEvent) -> None:
        """Append a line to events.jsonl."""
        self._append("events.jsonl", asdict(event))

    @_only_by_writer
    def append_sample(self, sample: Sample) -> None:
        """Append a line to samples.jsonl."""
        self._append("samples.jsonl", asdict(sample))

    @_only_by_writer
    def write_held_out(self, base: Evaluation, tuned: Evaluation) -> None:
        """Write held_out.jsonl: the loss of each held-out row before and after training."""
        pairs = zip(base.rows, tuned.rows, strict=True)
        lines = ({"base": asdict(before), "tuned": asdict(after)} for before, after in pairs)
        write_text(self.path / "held_out.jsonl", "".join(f"{to_json(line)}\n" for line in lines))

    @_only_by_writer
    def write_mask(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write mask.jsonl: some rows, split into parts that are trained on and parts that are masked."""
        write_text(self.path / "mask.jsonl", "".join(f"{to_json(row)}\n" for row in rows))

    @_only_by_writer
    def drop_lines_after(self, step: int) -> None:
        """Remove logged steps and samples after `step`, which a resumed run writes again."""
        for name in ("events.jsonl", "samples.jsonl"):
            if not (self.path / name).is_file():
                continue
            lines = read_lines(self.path / name)
            kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
            write_text(self.path / name, "".join(f"{to_json(line)}\n" for line in kept))

    @_only_by_writer
    def write_manifest(self) -> None:
        """Write size and hash of each file of a finished run; checkpoints are not part of the result."""
        for name, lines in self._waiting.items():
            self._write_waiting(name, f"its last lines are lost: {len(lines)}")
        left_out = (MANIFEST, "checkpoints", "tensorboard")
        files = [file for file in self.path.rglob("*") if file.relative_to(self.path).parts[0] not in left_out]
        entries = entries_of(self.path, (file for file in files if file.is_file()))
        write_text(self.path / MANIFEST, json.dumps(entries, indent=1) + "\n")

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line. If the system refuses, the line is written with the next one or with run.json."""
        waiting = self._waiting.setdefault(name, [])
        waiting.append(redact(f"{to_json(line)}\n").encode())
        self._write_waiting(name, "its lines are kept until it can be written" if len(waiting) == 1 else "")

    def _write_waiting(self, name: str, warning: str = "") -> None:
        """Append the lines that wait. If the system refuses, they go on waiting, and `warning` is given."""
        waiting = self._waiting[name]
        try:
            if waiting:
                append_lines(self.path / name, waiting)
            waiting.clear()
        except OSError as error:
            if warning:
                self.warn(f"{self.path / name}: {error.strerror or error}; {warning}")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path | str) -> dict[str, Any]:
    """The content of a run directory's run.json; a run that is "running" there and that nobody runs is "killed".

    Raises:
        InputError: it is not a run directory, or run.json is damaged.
    """
    file = Path(path).expanduser() / "run.json"
    if not file.is_file():
        raise InputError(f"{path} is not a run directory (no run.json); give the output_dir of a `nybble train`")
    record = read_object(file, InputError, "give another run")
    needed = {f.name for f in fields(RunRecord) if f.default is MISSING and f.default_factory is MISSING}
    texts = {"status", "started"}
    missing = sorted(name for name in needed if not isinstance(record.get(name), str if name in texts else dict))
    if missing:
        raise InputError(f"{file} is damaged (no {', '.join(missing)}); give another run")
    if record["status"] == "running" and not _is_held(file.parent):
        record["status"] = "killed"
    return record


def _is_held(folder: Path) -> bool:
    """Whether a process holds the lock of a run; where locks cannot be asked for, it is taken to."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return fcntl is None
    except OSError:
        return True
    finally:
        os.close(handle)


def clock_of(record: Mapping[str, Any]) -> datetime | None:
    """The local time that chat templates were told in a run; older versions noted only when it was started."""
    for name in ("clock", "started"):
        with suppress(KeyError, TypeError, ValueError):
            return datetime.fromisoformat(record[name]).astimezone().replace(tzinfo=None)
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a .jsonl file; a line that a crash cut short is skipped."""
    return read_whole_lines(path)[0]


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a .jsonl file, and how many lines were skipped because they are not objects."""
    if not path.is_file():
        return [], 0
    found: list[dict[str, Any]] = []
    # Not splitlines(): the text in a line may contain other separators.
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    for line in lines:
        try:
            found.append(parse_object(line))
        except ValueError:
            continue
    return found, len(lines) - len(found)
