"""Calibrated bases on disk: what `calibrate` made of the same weights, rows and settings is not computed again.

An entry is a 4-bit checkpoint with the numbers of its calibration beside it. Rows count by their token ids. Adapters
that calibration starts are not stored, so only `init_lora_weights: default` is taken from here. Calibration takes
minutes where packing takes seconds, so models of every size are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nybble.models.calibrate import Calibration
from nybble.models.load import SHARD_SIZE
from nybble.models.packed_cache import PackedCache
from nybble.models.source import ModelSource
from nybble.recipe import LoraSection, QuantizationSection
from nybble.storage.atomic import write_text
from nybble.storage.cache import digest

_VERSION = 1  # part of every key; raise it when calibration chooses other codes
_FIGURES = "calibration.json"


class CalibratedBase:
    """The calibrated form of a base in the cache."""

    def __init__(
        self,
        source: ModelSource,
        rows: Sequence[Sequence[int]],
        quantization: QuantizationSection,
        lora: LoraSection,
        compute_dtype: torch.dtype,
    ) -> None:
        self.folder: Path | None = None
        self._wanted = (
            quantization.cache
            and quantization.encoder == "calibrated"
            and lora.init_lora_weights == "default"
            and not source.is_4bit
        )
        if self._wanted:
            self._cache = PackedCache(quantization.cache_limit)
            settings = quantization.model_dump(exclude={"cache", "cache_limit", "calibration_rows"})
            settings |= {"version": _VERSION, "dtype": str(compute_dtype), "rows": digest(*(list(row) for row in rows))}
            self._key = self._cache.key(source.folder, settings)
            self.folder = self._cache.find(self._key)

    def figures(self) -> Calibration:
        """What was calibrated, of an entry that was found."""
        assert self.folder is not None  # noqa: S101 - for type checkers
        return Calibration(**json.loads((self.folder / _FIGURES).read_text(encoding="utf-8")))

    def keep(self, model: Any, calibration: Calibration) -> str | None:
        """Store a model that was calibrated; returns the reason, for people, if it could not be stored."""
        if not self._wanted or self.folder is not None:
            return None
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
        size = sum(t.numel() * t.element_size() for t in tensors)
        return self._cache.store(self._key, size, partial(_write, model, calibration))


def _write(model: Any, calibration: Calibration, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    write_text(folder / _FIGURES, json.dumps({**asdict(calibration), "starts": {}}))
