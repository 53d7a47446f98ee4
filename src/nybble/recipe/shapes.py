"""Shapes of widely used models, so that a plan needs neither download nor network.

Plain figures from the models' published config.json files. A name is looked up without regard to case, owner and
parts such as `-hf`, `-instruct`, `-it` and `-chat`, which leave the shape as it is.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from nybble.errors import ModelError


class Shape(NamedTuple):
    """The figures of a model that its memory and its work depend on."""

    kind: str  # transformers' model_type
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int
    tied: bool
    positions: int
    window: int | None = None
    experts: int = 0  # of each layer
    experts_per_token: int = 0
    expert_intermediate: int = 0


SHAPES = {
    "llama-2-7b": Shape("llama", 32, 4096, 11008, 32, 32, 32000, 128, False, 4096),
    "llama-2-13b": Shape("llama", 40, 5120, 13824, 40, 40, 32000, 128, False, 4096),
    "llama-2-70b": Shape("llama", 80, 8192, 28672, 64, 8, 32000, 128, False, 4096),
    "llama-3-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128256, 128, False, 8192),
    "llama-3-70b": Shape("llama", 80, 8192, 28672, 64, 8, 128256, 128, False, 8192),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128256, 128, False, 131072),
    "llama-3.1-70b": Shape("llama", 80, 8192, 28672, 64, 8, 128256, 128, False, 131072),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 128256, 64, True, 131072),
    "llama-3.2-3b": Shape("llama", 28, 3072, 8192, 24, 8, 128256, 128, True, 131072),
    "llama-3.3-70b": Shape("llama", 80, 8192, 28672, 64, 8, 128256, 128, False, 131072),
    "mistral-7b-v0.1": Shape("mistral", 32, 4096, 14336, 32, 8, 32000, 128, False, 32768, 4096),
    "mistral-7b-v0.3": Shape("mistral", 32, 4096, 14336, 32, 8, 32768, 128, False, 32768),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 151936, 64, True, 32768),
    "qwen2.5-1.5b": Shape("qwen2", 28, 1536, 8960, 12, 2, 151936, 128, True, 32768),
    "qwen2.5-3b": Shape("qwen2", 36, 2048, 11008, 16, 2, 151936, 128, True, 32768),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18944, 28, 4, 152064, 128, False, 32768),
    "qwen2.5-14b": Shape("qwen2", 48, 5120, 13824, 40, 8, 152064, 128, False, 32768),
    "qwen2.5-32b": Shape("qwen2", 64, 5120, 27648, 40, 8, 152064, 128, False, 32768),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 151936, 128, True, 40960),
    "qwen3-1.7b": Shape("qwen3", 28, 2048, 6144, 16, 8, 151936, 128, True, 40960),
    "qwen3-4b": Shape("qwen3", 36, 2560, 9728, 32, 8, 151936, 128, True, 40960),
    "qwen3-8b": Shape("qwen3", 36, 4096, 12288, 32, 8, 151936, 128, False, 40960),
    "qwen3-14b": Shape("qwen3", 40, 5120, 17408, 40, 8, 151936, 128, False, 40960),
    "qwen3-32b": Shape("qwen3", 64, 5120, 25600, 64, 8, 151936, 128, False, 40960),
    "qwen3-30b-a3b": Shape("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, 128, False, 40960, None, 128, 8, 768),
    "gpt-oss-20b": Shape("gpt_oss", 24, 2880, 2880, 64, 8, 201088, 64, False, 131072, 128, 32, 4, 2880),
    "gpt-oss-120b": Shape("gpt_oss", 36, 2880, 2880, 64, 8, 201088, 64, False, 131072, 128, 128, 4, 2880),
    "gemma-3-1b": Shape("gemma3_text", 26, 1152, 6912, 4, 1, 262144, 256, True, 32768, 512),
    "gemma-3-4b": Shape("gemma3_text", 34, 2560, 10240, 8, 4, 262208, 256, True, 131072, 1024),
    "gemma-3-12b": Shape("gemma3_text", 48, 3840, 15360, 16, 8, 262208, 256, True, 131072, 1024),
    "gemma-3-27b": Shape("gemma3_text", 62, 5376, 21504, 32, 16, 262208, 128, True, 131072, 1024),
    "phi-4": Shape("phi3", 40, 5120, 17920, 40, 10, 100352, 128, False, 16384),
}
_VARIANTS = r"-(hf|instruct|it|pt|chat|base)(?=-|$)"  # parts of a name that leave the shape as it is


def known_shape(name: str) -> str | None:
    """The key in SHAPES for a model's name or hub id; None if there is none."""
    bare = re.sub(_VARIANTS, "", name.rstrip("/").rpartition("/")[2].lower().replace("_", "-")).removeprefix("meta-")
    return bare if bare in SHAPES else None


def check_spelling(name: str | None) -> None:
    """Refuse a name that is almost that of a known shape, before any library is imported that could look it up.

    Raises:
        ModelError: it is no folder here, has no owner as hub ids have, and a known shape is spelt much alike.
    """
    if not name or "/" in name or Path(name).expanduser().exists() or known_shape(name) is not None:
        return
    if difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.8):
        raise not_known(name)


def not_known(name: str) -> ModelError:
    """The error for a name that is neither a folder nor a known shape, and cannot be fetched."""
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), SHAPES, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known shapes: {', '.join(SHAPES)}"
    return ModelError(f"{name!r} is neither a folder here nor a known shape; {hint}")
