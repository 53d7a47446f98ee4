"""The run directory: what a run leaves on disk.

    run.json          resolved recipe, versions, device, rows, plan, figures, status
    recipe.yaml       the resolved recipe alone; `nybble train` of it repeats the run
    mask.jsonl        some rows, and what is learned in them
    events.jsonl      a line per logged step
    held_out.jsonl    a line per held-out row: its loss before and after
    samples.jsonl     prompts with the answers of base and tuned model
    checkpoints/      checkpoint-N, see `nybble.storage.checkpoints`
    adapter/          PEFT's two files (method full: model/)
    report.html report.md report.json
    manifest.json     size and SHA-256 of every file above that the run finished with; written last

Each file is written under a temporary name, synced, then renamed (`nybble.storage.atomic`): a reader sees the old or
the new one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from nybble.errors import InputError
from nybble.guard import parse_object, read_object, redact
from nybble.run.record import Evaluation, RunRecord, Sample, StepEvent
from nybble.storage.atomic import append_lines, is_left_over, remove_left_overs, write_text
from nybble.storage.checkpoints import list_checkpoints
from nybble.storage.manifest import MANIFEST, entries_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class RunDirectory:
    """One run's folder, open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warn: Callable[[str], None] = lambda _text: None  # is told of lines that could not be written
        self._waiting: dict[str, list[bytes]] = {}  # file -> lines

    @classmethod
    def check(
        cls, path: Path | str, *, overwrite: bool = False, resume: bool = False, elsewhere: bool = False
    ) -> RunDirectory:
        """A folder that a run may be written into; nothing is changed until `create`.

        Args:
            path: need not exist.
            overwrite: what it holds may be removed, if it is a former run.
            resume: it is to be gone on from a checkpoint in it.
            elsewhere: a checkpoint lies in another folder.

        Raises:
            InputError: it holds something already and neither flag is given, there is nothing to resume, or it cannot
                be written.
        """
        run = cls(Path(path).expanduser())
        taken = run.path.exists() and not (run.path.is_dir() and all(is_left_over(path) for path in run.path.iterdir()))
        if resume and run.last_checkpoint() is None and not (elsewhere or run.is_begun):
            raise InputError(f"{run.path} holds no checkpoint to resume from; leave --resume away to start anew")
        if overwrite and resume:
            raise InputError("--overwrite removes what --resume would go on from; give one of them")
        if taken and not (overwrite or resume):
            raise InputError(f"output_dir {run.path} is not empty; use --overwrite, --resume, or another --output_dir")
        if taken and overwrite and not run.holds_run:
            raise InputError(f"{run.path} holds files but no run.json; --overwrite only replaces a former run")
        existing = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"output_dir {run.path} cannot be written ({existing} is not writable); choose another")
        return run

    def create(self, *, overwrite: bool = False) -> None:
        """Make the folder; with `overwrite`, remove the former run in it.

        Raises:
            InputError: the system refuses.
        """
        try:
            if overwrite and self.path.exists():
                for entry in self.path.iterdir():
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
        """Only one process writes a run; where the system or its file system knows no locks, nobody is kept out.

        Raises:
            InputError: another process does, or the folder cannot be made.
        """
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

    def discard(self) -> None:
        """Remove a run that came to nothing: wrong input found while loading must not block the next try."""
        for name in ("run.json", "recipe.yaml", "mask.jsonl"):
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
        """The 4-bit base, kept where loading the original again would not give the same."""
        return self.path / "base"

    @property
    def holds_run(self) -> bool:
        """It holds one, whether that came to its end or not."""
        return (self.path / "run.json").is_file()

    @property
    def is_begun(self) -> bool:
        """It holds a run that has brought nothing about yet."""
        return self.holds_run and not (self.adapter.exists() or self.full_model.exists())

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint; it may be damaged."""
        return next(iter(list_checkpoints([self.checkpoints])), None)

    def write_record(self, record: RunRecord) -> None:
        """Write run.json, and lines that had to wait."""
        for name in self._waiting:
            self._write_waiting(name)
        record.run_dir = str(self.path)
        write_text(self.path / "run.json", f"{to_json(record.to_json(), indent=2)}\n")

    def append_event(self, event: StepEvent) -> None:
        """Add a line to events.jsonl."""
        self._append("events.jsonl", asdict(event))

    def append_sample(self, sample: Sample) -> None:
        """Add a line to samples.jsonl."""
        self._append("samples.jsonl", asdict(sample))

    def write_held_out(self, base: Evaluation, tuned: Evaluation) -> None:
        """Write held_out.jsonl: each held-out row before and after training."""
        pairs = zip(base.rows, tuned.rows, strict=True)
        lines = ({"base": asdict(before), "tuned": asdict(after)} for before, after in pairs)
        write_text(self.path / "held_out.jsonl", "".join(f"{to_json(line)}\n" for line in lines))

    def write_mask(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write mask.jsonl: some rows, in stretches that are learned or masked."""
        write_text(self.path / "mask.jsonl", "".join(f"{to_json(row)}\n" for row in rows))

    def drop_lines_after(self, step: int) -> None:
        """Forget logged steps and samples beyond `step`, which a resumed run will write again."""
        for name in ("events.jsonl", "samples.jsonl"):
            if not (self.path / name).is_file():
                continue
            lines = read_lines(self.path / name)
            kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
            write_text(self.path / name, "".join(f"{to_json(line)}\n" for line in kept))

    def write_manifest(self) -> None:
        """Sizes and hashes of the finished run's files; checkpoints are not part of the result."""
        for name, lines in self._waiting.items():
            self._write_waiting(name, f"its last lines are lost: {len(lines)}")
        left_out = (MANIFEST, "checkpoints", "tensorboard")
        files = [file for file in self.path.rglob("*") if file.relative_to(self.path).parts[0] not in left_out]
        entries = entries_of(self.path, (file for file in files if file.is_file()))
        write_text(self.path / MANIFEST, json.dumps(entries, indent=1) + "\n")

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line; if the system refuses, it waits for the next one or run.json, and training goes on."""
        waiting = self._waiting.setdefault(name, [])
        waiting.append(redact(f"{to_json(line)}\n").encode())
        self._write_waiting(name, "its lines wait until it can be written" if len(waiting) == 1 else "")

    def _write_waiting(self, name: str, otherwise: str = "") -> None:
        """Add the lines that wait; if the system refuses, they stay, and `otherwise` is said."""
        waiting = self._waiting[name]
        try:
            if waiting:
                append_lines(self.path / name, waiting)
            waiting.clear()
        except OSError as error:
            if otherwise:
                self.warn(f"{self.path / name}: {error.strerror or error}; {otherwise}")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path | str) -> dict[str, Any]:
    """run.json of a run directory.

    Raises:
        InputError: it is no run directory, or run.json is damaged.
    """
    file = Path(path).expanduser() / "run.json"
    if not file.is_file():
        raise InputError(f"{path} is no run directory (no run.json); give the output_dir of a `nybble train`")
    record = read_object(file, InputError, "give another run")
    needed = {f.name for f in fields(RunRecord) if f.default is MISSING and f.default_factory is MISSING}
    texts = {"status", "started"}
    missing = sorted(name for name in needed if not isinstance(record.get(name), str if name in texts else dict))
    if missing:
        raise InputError(f"{file}: damaged (no {', '.join(missing)}); give another run")
    return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line cut short by a crash is skipped."""
    return read_whole_lines(path)[0]


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a .jsonl file, and how many lines were skipped because they hold none."""
    if not path.is_file():
        return [], 0
    found: list[dict[str, Any]] = []
    # Not splitlines(): text inside a line may hold other separators.
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    for line in lines:
        try:
            found.append(parse_object(line))
        except ValueError:
            continue
    return found, len(lines) - len(found)
