"""Writing a model as a 4-bit checkpoint, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nybble.data import prepare_rows, rows_cache
from nybble.errors import InputError, RecipeError
from nybble.hardware import detect_device
from nybble.models.calibrate import calibrate
from nybble.models.calibrated_cache import CalibratedBase
from nybble.models.load import load_model, save_whole
from nybble.models.skeleton import compute_dtype
from nybble.models.source import find_model
from nybble.models.tokenizer import load_tokenizer
from nybble.recipe import Recipe, load_recipe, within_context
from nybble.run.progress import ObserverChoice, watching
from nybble.run.record import Observer


def quantize(
    model: str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    *,
    recipe: Path | str | None = None,
    observer: ObserverChoice = "auto",
) -> dict[str, Any]:
    """Write `model` as a 4-bit checkpoint in bitsandbytes' layout to the new folder `out`; returns the report.

    With the `recipe` of a run whose encoder is `calibrated`, that is the base that the run made.

    Raises:
        InputError: `out` exists, or the model cannot be used.
    """
    resolved = load_recipe(recipe, {**(overrides or {}), "model_name_or_path": model})
    folder = Path(out).expanduser()
    if folder.exists():
        raise InputError(f"{folder} already exists; choose a new folder")
    with watching(observer) as watch:
        return _quantize(resolved, folder, watch)


def _quantize(recipe: Recipe, folder: Path, watch: Observer) -> dict[str, Any]:
    source = find_model(recipe.model)
    if source.is_4bit:
        raise RecipeError(f"{recipe.model.model_name_or_path} is stored in 4 bits already; give the 16-bit model")
    if recipe.lora.init_lora_weights != "default":
        raise RecipeError(
            "init_lora_weights starts an adapter, and quantize makes none; remove it, or use nybble train"
        )
    tokenizer = load_tokenizer(source, recipe.model)
    section = recipe.quantization
    rows: list[list[int]] = []
    if section.encoder == "calibrated":
        recipe = within_context(recipe, getattr(source.text_config, "max_position_embeddings", None), watch.note)
        prepared = prepare_rows(
            recipe.data,
            recipe.evaluation,
            tokenizer,
            recipe.training.seed,
            rows_cache(section),
            watch,
            recipe.preferences.objective,
        )
        rows = prepared.calibration_rows(section.calibration_rows)
    device = detect_device(recipe.model.device)
    kept = CalibratedBase(source, rows, section, recipe.lora, compute_dtype(section.bnb_4bit_compute_dtype, device)[0])
    packed, report = load_model(source, "qlora", recipe.model, section, device, packed_folder=kept.folder)
    if section.encoder == "calibrated" and kept.folder is None:
        done = calibrate(packed, source, rows, section, recipe.lora, partial(watch.progress, "calibrating"))
        kept.keep(packed, done)
    save_whole(folder, packed, tokenizer, source)
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"out": str(folder), "file_bytes": file_bytes, "bits_per_weight": report.bits_per_weight, **asdict(report)}
