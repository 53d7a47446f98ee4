"""Training and evaluation: the loop (start at `loop.train`), its state and checkpoints, and the recorder of a run."""

from nybble.training.best import check_best_step
from nybble.training.build import TrainResult, build, train_model
from nybble.training.checkpoint import Checkpointing, checkpointing, find_checkpoint, folders_of, refused_writes
from nybble.training.evaluate import (
    HeldOut,
    Sampling,
    evaluate,
    evaluation_mode,
    generate_answers,
    sample_answers,
    stop_at,
)
from nybble.training.fingerprint import identify
from nybble.training.held_out_preferences import HeldOutPreferences
from nybble.training.loop import Training, train
from nybble.training.lr_probe import Judge, Probe, probe_rates
from nybble.training.objective import NextToken, Objective
from nybble.training.optim import check_optimizer_and_schedule, optimizer_names, schedule_names
from nybble.training.preferences import PairObjective, RatedObjective
from nybble.training.reference import AnswerScorer, Kept, Reference, Start
from nybble.training.run_recorder import RunRecorder, software_versions
from nybble.training.trackers import Trackers, known_trackers, tracked, tracker_names

__all__ = [
    "AnswerScorer",
    "Checkpointing",
    "HeldOut",
    "HeldOutPreferences",
    "Judge",
    "Kept",
    "NextToken",
    "Objective",
    "PairObjective",
    "Probe",
    "RatedObjective",
    "Reference",
    "RunRecorder",
    "Sampling",
    "Start",
    "Trackers",
    "TrainResult",
    "Training",
    "build",
    "check_best_step",
    "check_optimizer_and_schedule",
    "checkpointing",
    "evaluate",
    "evaluation_mode",
    "find_checkpoint",
    "folders_of",
    "generate_answers",
    "identify",
    "known_trackers",
    "optimizer_names",
    "probe_rates",
    "refused_writes",
    "sample_answers",
    "schedule_names",
    "software_versions",
    "stop_at",
    "tracked",
    "tracker_names",
    "train",
    "train_model",
]
