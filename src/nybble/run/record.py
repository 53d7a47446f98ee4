"""What a run says of itself: its figures as data, and who is told of them while it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


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
    peak_bytes: int  # highest memory since the last line, of any process
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
    skipped_steps: int = 0  # whose loss or gradient was bad, under `bad_batch: skip`
    probe: dict[str, Any] | None = None  # how the learning rate was found, where it was probed
    evaluation_base: Evaluation | None = None
    evaluation_tuned: Evaluation | None = None
    eval_loss: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None  # by torch's allocator, at most, in the first process; None on a CPU
    processes: dict[str, Any] | None = None  # where there are several: count, ddp or fsdp, the peak of each
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
