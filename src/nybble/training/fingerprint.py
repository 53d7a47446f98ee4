"""The identity of a training: if any part of it changed, a resumed run would be another training.

Weights, tokenizer and rows count by content, wherever they are stored; settings count by value, except those that the
schema calls neutral (the device, the budgets, what is reported).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nybble.data import Prepared
from nybble.models import adapter_weights, weights_hash
from nybble.recipe import Recipe, all_settings, rows_per_step

_ROWS = "rows per step"
_OF_EVALUATIONS = ("evaluation.eval_strategy", "evaluation.eval_steps", "evaluation.max_eval_rows")
_CONTENT = {"base": "the base weights", "tokenizer": "the tokenizer", "rows": "the rows"}


@dataclass(frozen=True)
class Identity:
    """Of one training."""

    base: str  # the `weights_hash` of the base
    tokenizer: str  # its SHA-256
    rows: str  # SHA-256 of the examples in order and of what is learned in them
    settings: dict[str, Any]  # the recipe's settings by path

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How this training differs from the `other` (a dict of `to_json`), in words."""
        found = [words for name, words in _CONTENT.items() if getattr(self, name) != other.get(name)]
        there = other.get("settings")
        there = there if isinstance(there, dict) else {}
        here: dict[str, Any] = json.loads(json.dumps(self.settings))  # as a file gives it back: no tuples
        # A version that did not have a setting behaved as its default says.
        defaults = json.loads(json.dumps({item.path: item.default for item in all_settings()}, default=str))
        there = {**{name: value for name, value in defaults.items() if name in here}, **there}
        changed = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        for name in changed:
            was, now = there.get(name), here.get(name)
            way = f"; of all processes together, --train_batch_size {was} keeps it" if name == _ROWS else ""
            found.append(f"{name} (was {was!r}, is {now!r}{way})")
        return found


def identify(
    recipe: Recipe,
    base: Path,
    tokenizer: Any,
    prepared: Prepared,
    hash_of: Callable[[Path], str],
    n_processes: int = 1,
) -> Identity:
    """The identity of a training.

    Args:
        recipe: of the run.
        base: folder of the original weights.
        tokenizer: as it will be used, with its template.
        prepared: the rows.
        hash_of: the hash of a file by its content.
        n_processes: processes that train.
    """
    return Identity(
        base=weights_hash(base, hash_of),
        tokenizer=_tokenizer(tokenizer),
        rows=_rows(prepared),
        settings=_settings(recipe, n_processes) | _start(recipe, hash_of),
    )


def _start(recipe: Recipe, hash_of: Callable[[Path], str]) -> dict[str, Any]:
    """The adapter that training continues from, wherever it lies."""
    name = recipe.lora.adapter_name_or_path
    return {"the adapter": hash_of(adapter_weights(name))} if name else {}


def _settings(recipe: Recipe, n_processes: int) -> dict[str, Any]:
    found = {}
    values = recipe.model_dump(mode="json")
    decides = recipe.evaluation.load_best_model_at_end or recipe.evaluation.early_stopping_patience is not None
    for item in all_settings():
        # How often a run evaluates is neutral unless evaluations decide its end.
        counts = decides and item.path in _OF_EVALUATIONS
        if counts or not item.is_neutral:
            found[item.path] = values[item.section][item.name] if item.section else values[item.name]
    found[_ROWS] = rows_per_step(recipe.training, n_processes)  # how they are split is neutral
    return found


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([content, special, tokenizer.chat_template])


def _rows(prepared: Prepared) -> str:
    """Rows of one key have the same tokens, and the rows' own hash stands for all their text."""
    digest = hashlib.sha256(prepared.fingerprint.encode())
    for column in ("row", "key", "length", "n_trained"):
        digest.update(prepared.train.column(column).tobytes())
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
