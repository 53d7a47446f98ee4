"""Base models and adapters: find, load (streamed, packed on the way), attach, save."""

from nybble.models.adapter_files import CONFIG, PREFIX, AdapterFiles, read_adapter
from nybble.models.adapters import (
    add_adapter,
    attach,
    load_adapter,
    put_weights_back,
    save_adapter,
    trained_parameters,
    trained_weights,
)
from nybble.models.artifact import (
    NOTE,
    Artifact,
    check_original,
    find_artifact,
    load_artifact,
    source_of,
    tokenizer_of,
    write_note,
)
from nybble.models.base_weights import BaseWeights
from nybble.models.blocks import SwapReport, blocks_of, choice_for, swap_blocks
from nybble.models.calibrate import Calibration, Starts, calibrate, needs_calibration
from nybble.models.calibrated_cache import CalibratedBase
from nybble.models.content import weights_hash
from nybble.models.continued import adapter_weights, check_adapter_base, start_from, take_over_adapter
from nybble.models.cut_model import kinds_of_layers, with_layers
from nybble.models.expert_files import StoredExperts
from nybble.models.load import LoadReport, count_parameters, hash_of, load_model, save_whole, write_whole
from nybble.models.load_sharded import for_shards, load_in_shards
from nybble.models.memory_savers import MEMORY_SAVERS, MemorySavers
from nybble.models.meta_model import bare_model, materialize, meta_model
from nybble.models.quantizer import NybbleConfig, register
from nybble.models.sharding import full_tensors, held_bytes, is_sharded, shard, shard_like, shards_among, tables
from nybble.models.skeleton import (
    base_of,
    compute_dtype,
    decoder_layers,
    embeddings_and_head,
    model_without_weights,
    recomputable_layers,
    recompute_by,
    set_recomputed,
)
from nybble.models.source import ModelSource, find_folder, find_model, read_config
from nybble.models.targets import adapted_linears, same_in_every_layer
from nybble.models.tokenizer import find_tokenizer, load_tokenizer
from nybble.models.towers import complete, tower_bytes
from nybble.models.upload import push_folder
from nybble.models.vocabulary import NewTokens, add_new_tokens, grow_vocabulary, with_mean_rows

__all__ = [
    "CONFIG",
    "MEMORY_SAVERS",
    "NOTE",
    "PREFIX",
    "AdapterFiles",
    "Artifact",
    "BaseWeights",
    "CalibratedBase",
    "Calibration",
    "LoadReport",
    "MemorySavers",
    "ModelSource",
    "NewTokens",
    "NybbleConfig",
    "Starts",
    "StoredExperts",
    "SwapReport",
    "adapted_linears",
    "adapter_weights",
    "add_adapter",
    "add_new_tokens",
    "attach",
    "bare_model",
    "base_of",
    "blocks_of",
    "calibrate",
    "check_adapter_base",
    "check_original",
    "choice_for",
    "complete",
    "compute_dtype",
    "count_parameters",
    "decoder_layers",
    "embeddings_and_head",
    "find_artifact",
    "find_folder",
    "find_model",
    "find_tokenizer",
    "for_shards",
    "full_tensors",
    "grow_vocabulary",
    "hash_of",
    "held_bytes",
    "is_sharded",
    "kinds_of_layers",
    "load_adapter",
    "load_artifact",
    "load_in_shards",
    "load_model",
    "load_tokenizer",
    "materialize",
    "meta_model",
    "model_without_weights",
    "needs_calibration",
    "push_folder",
    "put_weights_back",
    "read_adapter",
    "read_config",
    "recomputable_layers",
    "recompute_by",
    "register",
    "same_in_every_layer",
    "save_adapter",
    "save_whole",
    "set_recomputed",
    "shard",
    "shard_like",
    "shards_among",
    "source_of",
    "start_from",
    "swap_blocks",
    "tables",
    "take_over_adapter",
    "tokenizer_of",
    "tower_bytes",
    "trained_parameters",
    "trained_weights",
    "weights_hash",
    "with_layers",
    "with_mean_rows",
    "write_note",
    "write_whole",
]
