"""Base models and adapters: find, load (streamed, packed on the way), attach, save."""

from nybble.models.adapters import attach, load_adapter, save_adapter
from nybble.models.hub import push_folder
from nybble.models.load import LoadReport, compute_dtype, count_parameters, load_model, load_tokenizer
from nybble.models.plugin import NybbleConfig, register
from nybble.models.source import ModelSource, find_folder, find_model

__all__ = [
    "LoadReport",
    "ModelSource",
    "NybbleConfig",
    "attach",
    "compute_dtype",
    "count_parameters",
    "find_folder",
    "find_model",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "push_folder",
    "register",
    "save_adapter",
]
