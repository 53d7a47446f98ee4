"""The figures of a run as data, and the observer that receives them while it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class StepEvent:
    """One logged step: a line of events.jsonl."""

    step: int
    total_steps: int
    loss: float | None  # nats a trained token, mean over the steps since the last line
    learning_rate: float | None
    grad_norm: float | None
    tokens: int  # since the start, without padding
    seconds: float  # since the first step began
    peak_bytes: int  # highest memory of any process since the last line
    eval_loss: float | None = None
    figures: dict[str, float] | None = None  # what the objective reports, by TRL's names, mean over the same steps


@dataclass(frozen=True)
class RowLoss:
    """One held-out row, or one part of a split row: half a line of held_out.jsonl."""

    row: int  # its number in the rows, from 1
    n_tokens: int  # trained tokens
    loss: float  # the sum over these tokens, in nats
    is_right: bool | None  # whether the generated answer equals the expected one, if the row has one


@dataclass(frozen=True)
class PreferenceFigures:
    """What held-out rows say about a preference objective; the reference is the model as training started."""

    n_rows: int  # pairs, or rated answers
    likelier: float | None  # share of pairs whose chosen answer has the higher log-probability; None: no pairs
    accuracy: float | None = None  # share of pairs whose chosen answer has the higher reward, or of answers whose
    accuracy_low: float | None = None  # reward has the sign of their label; None where all rewards are 0 by definition
    accuracy_high: float | None = None  # 95 % interval
    chosen_reward: float | None = None  # mean over chosen, or good, answers
    rejected_reward: float | None = None
    margin: float | None = None  # between the two means
    log_ratio: float | None = None  # nats a token of all answers: log p(answer) less that under the reference


@dataclass(frozen=True)
class Evaluation:
    """Figures over held-out rows; of pairs and rated answers, the loss is that of chosen, or good, answers."""

    loss: float  # nats a trained token
    perplexity: float
    n_rows: int
    n_tokens: int
    exact_match: float | None  # share of rows answered exactly, if rows have an expected answer
    seconds: float
    preferences: PreferenceFigures | None = None
    rows: tuple[RowLoss, ...] = field(default=(), repr=False)  # written to held_out.jsonl, not to run.json
    # The log-probabilities of each row's answers, under a preference objective; of the base, they are the reference's.
    answers: tuple[tuple[float, ...], ...] = field(default=(), repr=False)  # not written


@dataclass(frozen=True)
class Sample:
    """One prompt and the answers to it."""

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
    """The content of run.json."""

    status: str  # "running", "done", "stopped" or "failed"; `read_record` knows "killed" besides
    recipe: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    device: dict[str, Any] = field(repr=False)
    rows: dict[str, Any] = field(repr=False)  # ledger and fingerprint
    plan: dict[str, Any] = field(repr=False)
    model: dict[str, Any] = field(repr=False)  # how the base was loaded
    started: str  # UTC, ISO 8601
    clock: str | None = None  # local time that chat templates are told: that of the first start
    notes: list[str] = field(default_factory=list)
    phases: dict[str, Phase] = field(default_factory=dict, repr=False)
    paths: dict[str, str] = field(default_factory=dict, repr=False)  # operator -> the backend that ran
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    seconds_to_first_step: float | None = None
    tokens_per_second: float | None = None
    train_loss: float | None = None
    skipped_steps: int = 0  # skipped under `bad_batch: skip` because loss or gradient was bad
    best: dict[str, Any] | None = None  # step, metric and value of the best evaluation during the training
    weights_step: int | None = None  # after which the weights are those of the result: the last, or the best
    probe: dict[str, Any] | None = field(default=None, repr=False)  # how the learning rate was found, if it was probed
    evaluation_base: Evaluation | None = None
    evaluation_tuned: Evaluation | None = None
    eval_loss: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None  # the most that torch's allocator reserved in the first process; None on a CPU
    # If there are several processes: count, ddp or fsdp, the peak of each.
    processes: dict[str, Any] | None = field(default=None, repr=False)
    seconds: float | None = None
    run_dir: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record as plain data."""
        content = asdict(self)
        for evaluation in (content["evaluation_base"], content["evaluation_tuned"]):
            if evaluation is not None:
                del evaluation["rows"], evaluation["answers"]
        return content


class Observer(Protocol):
    """Receives the progress of a run."""

    def stage(self, name: str) -> None:
        """A stage of the run begins."""

    def note(self, text: str) -> None:
        """There is something that the user should know."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Work other than training has advanced."""

    def step(self, event: StepEvent) -> None:
        """A step was logged."""


class Silent:
    """An observer that ignores everything."""

    def stage(self, name: str) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Do nothing."""

    def step(self, event: StepEvent) -> None:
        """Do nothing."""
