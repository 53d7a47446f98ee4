"""The tokenizer, with a pad token that is not its end token.

Padding with the end token hides every real end token from the loss: the model never learns to stop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nybble.errors import ModelError
from nybble.models.source import ModelSource, find_folder
from nybble.recipe import ModelSection


def load_tokenizer(source: ModelSource, model: ModelSection) -> Any:
    """The tokenizer of a model that will be trained, with a pad token that is not its end token.

    Raises:
        ModelError: there is none, it has no end token, or it has more tokens than the model.
    """
    folder = find_folder(model.tokenizer_name_or_path) if model.tokenizer_name_or_path else source.folder
    tokenizer = _read(folder, model.trust_remote_code)
    if len(tokenizer) > source.config.vocab_size:
        raise ModelError(
            f"{folder}: {len(tokenizer)} tokens, the model has embeddings for {source.config.vocab_size}; "
            "give the tokenizer that belongs to the model"
        )
    return tokenizer


def find_tokenizer(model: ModelSection) -> tuple[Any, int | None]:
    """The tokenizer that `model` names and the context of its model where the folder says it; no weights are needed.

    Raises:
        ModelError: there is none, or it has no end token.
    """
    name = model.tokenizer_name_or_path or model.model_name_or_path
    if not name:
        raise ModelError("no tokenizer given; set --model_name_or_path (or --tokenizer_name_or_path) to a folder")
    revision = None if model.tokenizer_name_or_path else model.model_revision
    folder = find_folder(name, revision, with_weights=False)
    return _read(folder, model.trust_remote_code), _context(folder)


def _context(folder: Path) -> int | None:
    file = folder / "config.json"
    try:
        limit = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{file}: not a model's config ({str(error).partition(chr(10))[0]})") from error
    return limit if isinstance(limit, int) else None


def _read(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no end token (eos_token); a model could never learn to stop")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _padding(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _padding(tokenizer: Any) -> str:
    """The unknown token, or the first unused special token."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for token in (tokenizer.unk_token, *tokenizer.all_special_tokens):
        if token is not None and token not in taken:
            return str(token)
    # Padded positions are masked in loss and attention, so the identity of the token does not matter.
    return str(tokenizer.convert_ids_to_tokens(0))
