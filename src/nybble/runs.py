"""The run directory: what a run leaves on disk, and who watches it while it runs.

    run.json          resolved recipe, versions, device, rows, plan, figures, status
    recipe.yaml       the resolved recipe alone; `nybble train` of it repeats the run
    mask.jsonl        some rows, and what is learned in them
    events.jsonl      a line per logged step
    held_out.jsonl    a line per held-out row: its loss before and after
    samples.jsonl     prompts with the answers of base and tuned model
    checkpoints/      checkpoint-N, transformers' layout
    adapter/          PEFT's two files (method full: model/)
    report.html report.md report.json
    manifest.json     size and SHA-256 of every file above that the run finished with; written last

Files are written under a temporary name, synced, then renamed: a reader sees the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from nybble.errors import InputError
from nybble.guard import parse_object, read_object, redact


@dataclass(frozen=True)
class StepEvent:
    """One logged step; a line of events.jsonl."""

    step: int
    total_steps: int
    loss: float | None  # mean over the steps since the last line; nats a learned token
    learning_rate: float | None
    grad_norm: float | None
    tokens: int  # tokens since the start, padding left out
    seconds: float  # since the first step began
    peak_bytes: int  # highest memory since the last line
    eval_loss: float | None = None


@dataclass(frozen=True)
class RowLoss:
    """One held-out row (or a part of a split one); a line of held_out.jsonl."""

    row: int  # its number in the rows, from 1
    n_tokens: int  # learned ones
    loss: float  # their sum, in nats
    is_right: bool | None  # whether the answer was exact, where the row carries one


@dataclass(frozen=True)
class Evaluation:
    """Figures over held-out rows."""

    loss: float  # nats a learned token
    perplexity: float
    n_rows: int
    n_tokens: int
    exact_match: float | None  # share of rows answered exactly, where rows carry an answer
    seconds: float
    rows: tuple[RowLoss, ...] = ()  # lie in held_out.jsonl, not in run.json


@dataclass(frozen=True)
class Sample:
    """One prompt and what was answered."""

    prompt: str
    base: str | None
    tuned: str | None
    expected: str | None = None
    step: int | None = None


@dataclass
class Phase:
    """Memory and time of one part of the run."""

    predicted_bytes: int | None
    measured_bytes: int
    seconds: float


@dataclass
class RunRecord:
    """What run.json holds."""

    status: str  # "running", "done", "stopped" or "failed"
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: dict[str, Any]
    rows: dict[str, Any]  # ledger and fingerprint
    plan: dict[str, Any]
    model: dict[str, Any]  # how the base was loaded
    started: str  # UTC, ISO 8601
    notes: list[str] = field(default_factory=list)
    phases: dict[str, Phase] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)  # operator -> the path that ran
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    seconds_to_first_step: float | None = None
    tokens_per_second: float | None = None
    train_loss: float | None = None
    probe: dict[str, Any] | None = None  # how the learning rate was found, where it was probed
    evaluation_base: Evaluation | None = None
    evaluation_tuned: Evaluation | None = None
    eval_loss: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    run_dir: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        content = asdict(self)
        for evaluation in (content["evaluation_base"], content["evaluation_tuned"]):
            if evaluation is not None:
                del evaluation["rows"]
        return content


class Observer(Protocol):
    """Who is told how a run goes."""

    def stage(self, name: str) -> None:
        """A part of the run begins."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Work other than training has got so far."""

    def step(self, event: StepEvent) -> None:
        """A step was logged."""


class Silent:
    """An observer that says nothing."""

    def stage(self, name: str) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Ignore."""

    def step(self, event: StepEvent) -> None:
        """Ignore."""


class RunDirectory:
    """One run's folder, open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def check(cls, path: Path | str, *, overwrite: bool = False, resume: bool = False) -> RunDirectory:
        """A folder that a run may be written into; nothing is changed until `create`.

        Raises:
            InputError: it holds something already and neither flag is given, there is nothing to resume, or it cannot
                be written.
        """
        run = cls(Path(path).expanduser())
        taken = run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir()))
        if resume and run.last_checkpoint() is None:
            raise InputError(f"{run.path} holds no checkpoint to resume from; leave --resume away to start anew")
        if overwrite and resume:
            raise InputError("--overwrite removes what --resume would go on from; give one of them")
        if taken and not (overwrite or resume):
            raise InputError(f"output_dir {run.path} is not empty; use --overwrite, --resume, or another --output_dir")
        if taken and overwrite and not (run.path / "run.json").is_file():
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
        except OSError as error:
            raise InputError(f"output_dir {self.path} cannot be written ({error.strerror}); choose another") from error

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

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
        return max(found, key=lambda p: int(p.name.partition("-")[2]), default=None)

    def write_record(self, record: RunRecord) -> None:
        """Write run.json."""
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

    def drop_events_after(self, step: int) -> tuple[int, float]:
        """Forget logged steps beyond `step`, which a resumed run will log again; tokens and seconds up to there."""
        kept = [event for event in read_lines(self.path / "events.jsonl") if event.get("step", 0) <= step]
        write_text(self.path / "events.jsonl", "".join(f"{to_json(event)}\n" for event in kept))
        last = kept[-1] if kept else {}
        return int(last.get("tokens") or 0), float(last.get("seconds") or 0.0)

    def write_manifest(self) -> None:
        """Sizes and hashes of the finished run's files; checkpoints are not part of the result."""
        files = {}
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if file.is_file() and name != "manifest.json" and not name.startswith(("checkpoints/", "tensorboard/")):
                files[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        write_text(self.path / "manifest.json", json.dumps(files, indent=1) + "\n")

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a+b") as file:
            # A line cut short by a crash is ended first, so that it does not swallow this one.
            if file.tell() and (file.seek(-1, os.SEEK_END) or True) and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(redact(f"{to_json(line)}\n").encode())


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: temporary name, sync, rename, sync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(redact(text))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
