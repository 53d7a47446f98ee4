"""Turning a run into a model that other programs read: merge and verify, GGUF, Ollama, the hub."""

from nybble.exporting.destinations import export
from nybble.exporting.merging import merge
from nybble.exporting.verify import Limits, Reference

__all__ = ["Limits", "Reference", "export", "merge"]
