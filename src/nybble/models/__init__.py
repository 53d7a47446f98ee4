"""Base models and adapters: find, load (streamed, packed on the way), attach, save."""

from nybble.models.adapter_files import PREFIX, AdapterFiles, read_adapter
from nybble.models.adapters import (
    add_adapter,
    attach,
    load_adapter,
    put_weights_back,
    save_adapter,
    trained_parameters,
    trained_weights,
)
from nybble.models.calibrate import Calibration, Starts, calibrate, needs_calibration
from nybble.models.families import SwapReport, blocks_of, swap_blocks
from nybble.models.hub import push_folder
from nybble.models.lean import RUNGS, Ladder
from nybble.models.load import LoadReport, count_parameters, hash_of, load_model, save_whole
from nybble.models.meta_model import config_with_layers, materialize, meta_model
from nybble.models.plugin import NybbleConfig, register
from nybble.models.sharding import held_bytes, is_sharded, shard, shard_like, tables, whole
from nybble.models.skeleton import (
    CausalLM,
    base_of,
    compute_dtype,
    decoder_layers,
    recomputable_layers,
    set_recomputed,
)
from nybble.models.source import ModelSource, find_folder, find_model, read_config
from nybble.models.tokenizer import find_tokenizer, load_tokenizer
from nybble.models.tuned import NOTE, Tuned, check_original, find_tuned, load_tuned, tokenizer_of, write_note
from nybble.models.weights import BaseWeights

__all__ = [
    "NOTE",
    "PREFIX",
    "RUNGS",
    "AdapterFiles",
    "BaseWeights",
    "Calibration",
    "CausalLM",
    "Ladder",
    "LoadReport",
    "ModelSource",
    "NybbleConfig",
    "Starts",
    "SwapReport",
    "Tuned",
    "add_adapter",
    "attach",
    "base_of",
    "blocks_of",
    "calibrate",
    "check_original",
    "compute_dtype",
    "config_with_layers",
    "count_parameters",
    "decoder_layers",
    "find_folder",
    "find_model",
    "find_tokenizer",
    "find_tuned",
    "hash_of",
    "held_bytes",
    "is_sharded",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "load_tuned",
    "materialize",
    "meta_model",
    "needs_calibration",
    "push_folder",
    "put_weights_back",
    "read_adapter",
    "read_config",
    "recomputable_layers",
    "register",
    "save_adapter",
    "save_whole",
    "set_recomputed",
    "shard",
    "shard_like",
    "swap_blocks",
    "tables",
    "tokenizer_of",
    "trained_parameters",
    "trained_weights",
    "whole",
    "write_note",
]
