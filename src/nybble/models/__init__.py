"""Base models and adapters: find, load (streamed, packed on the way), attach, save."""

from nybble.models.adapters import attach, load_adapter, save_adapter
from nybble.models.calibrate import Calibration, Starts, calibrate, needs_calibration
from nybble.models.families import SwapReport, blocks_of, go_lean, swap_blocks
from nybble.models.hub import push_folder
from nybble.models.load import LoadReport, compute_dtype, count_parameters, load_model, save_whole
from nybble.models.plugin import NybbleConfig, register
from nybble.models.source import ModelSource, find_folder, find_model
from nybble.models.tokenizer import find_tokenizer, load_tokenizer

__all__ = [
    "Calibration",
    "LoadReport",
    "ModelSource",
    "NybbleConfig",
    "Starts",
    "SwapReport",
    "attach",
    "blocks_of",
    "calibrate",
    "compute_dtype",
    "count_parameters",
    "find_folder",
    "find_model",
    "find_tokenizer",
    "go_lean",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "needs_calibration",
    "push_folder",
    "register",
    "save_adapter",
    "save_whole",
    "swap_blocks",
]
