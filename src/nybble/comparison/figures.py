"""The figures of a comparison, computed from the run directories of its arms alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from nybble.comparison.arms import ArmPlan, Trial
from nybble.comparison.child import TrialEnding
from nybble.intervals import Interval, Sums, interval, share_interval
from nybble.run.directory import RunDirectory, read_lines, read_record

# Figures of run.json that are averaged over seeds; of the others, the largest or the first counts.
_MEANS = ("train_loss", "tokens_per_second", "seconds", "seconds_to_first_step")


@dataclass(frozen=True)
class Arm:
    """The figures of one arm, as means over its seeds; a missing figure is None."""

    name: str
    method: str
    objective: str
    status: str  # "done", "failed", "does not fit" or "waiting"
    measured: bool
    error: str | None
    seeds: tuple[int, ...]  # the seeds whose runs have finished
    learning_rates: tuple[float | str, ...]  # one for each seed; they differ only if the rate was probed
    learning_rate_source: str
    run_dirs: tuple[str, ...]  # relative to the comparison
    base_loss: float | None = None
    eval_loss: float | None = None  # nats a trained token
    eval_loss_interval: Interval | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    exact_match_interval: Interval | None = None
    preference_accuracy: float | None = None  # of held-out pairs, by the objective's own rewards
    preference_accuracy_interval: Interval | None = None  # of the rows, in the mean over seeds
    likelier: float | None = None  # share of held-out pairs whose chosen answer is the likelier
    train_loss: float | None = None
    peak_bytes: int | None = None  # highest of all phases and seeds
    reserved_bytes: int | None = None  # by torch's allocator on a GPU; None on a CPU
    predicted_bytes: int | None = None  # the only memory figure of an arm that does not fit
    device: str | None = None
    seconds: float | None = None
    seconds_to_first_step: float | None = None
    tokens_per_second: float | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    bits_per_weight: float | None = None  # of the packed linears
    produced_bytes: int | None = None  # on disk, without the tokenizer


@dataclass(frozen=True)
class Difference:
    """Arm `a` minus arm `b`, over the same rows and seeds."""

    a: str
    b: str
    loss: Interval  # nats a trained token
    exact_match: Interval | None


@dataclass(frozen=True)
class Comparison:
    """The content of comparison.json."""

    out: str
    arms: tuple[Arm, ...]
    differences: tuple[Difference, ...]
    same_rows: bool  # whether all measured arms were evaluated on the same rows
    n_held_out: int | None
    verdict: str = ""

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Judged:
    """The losses of one run on its held-out rows."""

    key: tuple[Any, ...]  # equal if the rows are the same
    loss: Sums
    right: Sums | None


def collect(folder: Path, plans: Sequence[ArmPlan], endings: Mapping[Path, TrialEnding]) -> Comparison:
    """The comparison as it is on disk; `endings` belong to the runs that ended in this process."""
    arms, judged = [], {}
    for plan in plans:
        done = {t: record for t in plan.trials if (record := _record(t)) is not None and record["status"] == "done"}
        judged[plan.name] = {t.seed: j for t in done if (j := _judged(t, done[t])) is not None}
        arms.append(_arm(plan, done, list(judged[plan.name].values()), endings))
    differences = [
        difference for a, b in combinations(judged, 2) if (difference := _difference(a, b, judged)) is not None
    ]
    measured = [arm for arm in arms if arm.eval_loss is not None]
    keys = {frozenset((seed, j.key) for seed, j in judged[arm.name].items()) for arm in measured}
    n_rows = next((len(j.loss.totals) for arm in measured for j in judged[arm.name].values()), None)
    return Comparison(str(folder), tuple(arms), tuple(differences), len(keys) <= 1, n_rows)


def _record(trial: Trial) -> dict[str, Any] | None:
    return read_record(trial.run_dir) if (trial.run_dir / "run.json").is_file() else None


def _judged(trial: Trial, record: Mapping[str, Any]) -> _Judged | None:
    rows = [line["tuned"] for line in read_lines(trial.run_dir / "held_out.jsonl")]
    if not rows:
        return None
    right = [row["is_right"] for row in rows]
    key = (record["rows"]["sha256"], *((row["row"], row["n_tokens"]) for row in rows))
    answered = Sums([float(x) for x in right], [1.0] * len(right)) if None not in right else None
    return _Judged(key, Sums([row["loss"] for row in rows], [row["n_tokens"] for row in rows]), answered)


def _arm(
    plan: ArmPlan, done: Mapping[Trial, dict[str, Any]], judged: Sequence[_Judged], endings: Mapping[Path, TrialEnding]
) -> Arm:
    ended = [endings[trial.run_dir] for trial in plan.trials if trial.run_dir in endings]
    failure = next((ending for ending in ended if ending.code != 0), None)
    does_not_fit = failure is not None and failure.code == 3
    status = "does not fit" if does_not_fit else "failed" if failure else "waiting"
    arm: dict[str, Any] = {
        "name": plan.name,
        "method": plan.recipe.method,
        "objective": plan.recipe.preferences.objective,
        "status": "done" if len(done) == len(plan.trials) else status,
        "measured": bool(done),
        "error": failure.error if failure else None,
        "seeds": tuple(trial.seed for trial in done),
        "learning_rates": (plan.recipe.training.learning_rate,),
        "learning_rate_source": plan.rate_source,
        "run_dirs": tuple(trial.run_dir.name for trial in plan.trials),
    }
    if done:
        return Arm(**arm | _figures(list(done.values()), list(done), judged))
    return Arm(**arm | (failure.predicted or {} if failure else {}))


def _figures(
    records: Sequence[Mapping[str, Any]], trials: Sequence[Trial], judged: Sequence[_Judged]
) -> dict[str, Any]:
    first = records[0]
    tuned = [record["evaluation_tuned"] for record in records if record["evaluation_tuned"]]
    base = [record["evaluation_base"]["loss"] for record in records if record["evaluation_base"]]
    answered = [j.right for j in judged if j.right is not None]
    predicted = [p["predicted_bytes"] for record in records for p in record["phases"].values() if p["predicted_bytes"]]
    packed = first["model"].get("packed_elements")
    means = {name: _mean([record[name] for record in records]) for name in _MEANS}
    return means | {
        "learning_rates": tuple(_rate(record) for record in records),
        "base_loss": _mean(base),
        "eval_loss": _mean([t["loss"] for t in tuned]),
        "eval_loss_interval": interval([j.loss for j in judged]),
        "perplexity": _mean([t["perplexity"] for t in tuned]),
        "exact_match": _mean([t["exact_match"] for t in tuned]),
        "exact_match_interval": share_interval([[bool(row) for row in one.totals] for one in answered]),
        **_preferences(tuned),
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "reserved_bytes": max((r["reserved_bytes"] for r in records if r.get("reserved_bytes")), default=None),
        "predicted_bytes": max(predicted, default=None),
        "device": first["device"]["name"],
        "trainable_parameters": first["trainable_parameters"],
        "total_parameters": first["total_parameters"],
        "bits_per_weight": 8 * first["model"]["packed_bytes"] / packed if packed else None,
        "produced_bytes": _produced_bytes(trials[0]),
    }


def _preferences(tuned: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What held-out pairs or rated answers say, as means over seeds."""
    known = [found for t in tuned if (found := t.get("preferences"))]
    names = ("accuracy", "accuracy_low", "accuracy_high")
    accuracy, low, high = ([found[name] for found in known] for name in names)
    value, least, most = (_mean(each) for each in (accuracy, low, high))
    span = None if value is None or least is None or most is None else Interval(value, least, most)
    return {
        "preference_accuracy": value,
        "preference_accuracy_interval": span,
        "likelier": _mean([found["likelier"] for found in known]),
    }


def _produced_bytes(trial: Trial) -> int:
    run = RunDirectory(trial.run_dir)
    return sum(f.stat().st_size for folder in (run.adapter, run.full_model) for f in folder.glob("*.safetensors"))


def _rate(record: Mapping[str, Any]) -> float | str:
    """The learning rate that the run used."""
    rate: float | str = (record.get("probe") or {}).get("learning_rate") or record["recipe"]["training"][
        "learning_rate"
    ]
    return rate


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _difference(a: str, b: str, judged: Mapping[str, Mapping[int, _Judged]]) -> Difference | None:
    """The difference over the seeds that both arms have, if they were evaluated on the same rows."""
    pairs = [(judged[a][seed], judged[b][seed]) for seed in judged[a].keys() & judged[b].keys()]
    if any(x.key != y.key for x, y in pairs):
        return None
    loss = interval([x.loss.minus(y.loss) for x, y in pairs])
    answers = [x.right.minus(y.right) for x, y in pairs if x.right and y.right]
    return Difference(a, b, loss, interval(answers)) if loss else None
