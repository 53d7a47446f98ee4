"""Leaving with a model that works: merge, verify, GGUF, Ollama, hub."""

from nybble.exporting.export import export
from nybble.exporting.merge import merge
from nybble.exporting.verify import Limits, Reference

__all__ = ["Limits", "Reference", "export", "merge"]
