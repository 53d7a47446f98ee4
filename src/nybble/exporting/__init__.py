"""Leaving with a model that works: merge, verify, GGUF, Ollama, hub."""

from nybble.exporting.merge import merge
from nybble.exporting.verify import Limits

__all__ = ["Limits", "merge"]
