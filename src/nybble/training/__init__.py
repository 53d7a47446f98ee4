"""Training and evaluation on transformers' Trainer, and the witness of a run."""

from nybble.training.arguments import check_training
from nybble.training.continuation import Checkpointing, checkpointing, find_checkpoint, folders_of, refused_writes
from nybble.training.evaluate import evaluate, evaluation_mode, generate_answers, stop_at
from nybble.training.identity import identify
from nybble.training.probe import Judge, Probe, probe_rates
from nybble.training.trainer import Setup, TrainResult, train_model
from nybble.training.witness import Witness, software_versions

__all__ = [
    "Checkpointing",
    "Judge",
    "Probe",
    "Setup",
    "TrainResult",
    "Witness",
    "check_training",
    "checkpointing",
    "evaluate",
    "evaluation_mode",
    "find_checkpoint",
    "folders_of",
    "generate_answers",
    "identify",
    "probe_rates",
    "refused_writes",
    "software_versions",
    "stop_at",
    "train_model",
]
