"""A trained artifact: what a run left, an adapter folder, or a folder with a whole model.

Next to trained weights is `nybble.json`, which says how the base was packed, which base it was (its fingerprint), how
prompts were formatted and which tokens end an answer. So an adapter or a merged model that was copied elsewhere is
still asked in the way it was trained. Folders written by other tools lack that file; their own files decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError

from nybble.errors import CannotRunError, InputError, ModelError
from nybble.guard import as_path, check_links, read_object
from nybble.hardware import Device
from nybble.models.adapter_files import read_adapter, read_settings
from nybble.models.adapters import load_adapter
from nybble.models.content import weights_hash
from nybble.models.load import hash_of, load_model
from nybble.models.skeleton import compute_dtype, embeddings_and_head, model_without_weights
from nybble.models.source import ModelSource, find_model
from nybble.models.tokenizer import load_tokenizer
from nybble.recipe import (
    LoraSection,
    ModelSection,
    QuantizationSection,
    Recipe,
    first_fault,
    load_recipe,
    stored_recipe,
)
from nybble.run.directory import RunDirectory, clock_of, read_record, to_json
from nybble.storage.atomic import write_text

NOTE = "nybble.json"


class _Note(BaseModel):
    """The content of `nybble.json`; files of older versions may lack some of it."""

    method: Literal["qlora", "lora", "full"] | None = None
    quantization: QuantizationSection = QuantizationSection()
    init_lora_weights: str = LoraSection().init_lora_weights
    prompt_form: str = ""
    stop_tokens: tuple[NonNegativeInt, ...] = ()
    base_fingerprint: str | None = None
    base_hash: str | None = None
    clock: datetime | None = None


@dataclass(frozen=True)
class Artifact:
    """Trained weights, and the base that they belong to."""

    name: str  # as the user named it
    folder: Path  # contains the adapter or the whole model, and its tokenizer
    is_adapter: bool
    method: str  # how the base, or the whole model, is loaded
    base: ModelSection  # what the adapter was trained on; for a whole model, the model itself
    original: ModelSection  # the model that training started from
    quantization: QuantizationSection  # with the compute type of the training, which may differ from the one asked for
    init: str  # how the adapter was initialised, `LoraSection.init_lora_weights`
    form: str  # how prompts are put, see `nybble.data.encode_prompt`; "" if unknown
    stop_tokens: tuple[int, ...]
    fingerprint: str | None  # of the original
    weights_hash: str | None  # of the original
    clock: datetime | None = None  # local time that chat templates were told in the training; None: not known

    @property
    def is_repaired(self) -> bool:
        """True if the adapter holds a part of the original, or of what packing lost, and fits only its own base."""
        return self.init != "default"


def write_note(
    folder: Path, recipe: Recipe, ledger: Mapping[str, Any], loaded: Mapping[str, Any], clock: datetime
) -> None:
    """Write `nybble.json` next to the weights that a run has trained; `loaded` is the record's `model`."""
    note = {
        "method": recipe.method,
        "quantization": as_trained(recipe.quantization, loaded).model_dump(mode="json"),
        "init_lora_weights": recipe.lora.init_lora_weights,
        "prompt_form": ledger["prompt_form"],
        "stop_tokens": list(ledger["stop_tokens"]),
        "base_fingerprint": loaded.get("fingerprint"),
        "base_hash": loaded.get("weights_hash"),
        "clock": clock.isoformat(),
    }
    write_text(folder / NOTE, to_json(note, indent=1) + "\n")


def as_trained(quantization: QuantizationSection, loaded: Mapping[str, Any]) -> QuantizationSection:
    """The settings with the compute type that training used in place of the one that was asked for."""
    return quantization.model_copy(
        update={"bnb_4bit_compute_dtype": loaded.get("compute_dtype", quantization.bnb_4bit_compute_dtype)}
    )


def find_artifact(name: str, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """The artifact that `name` refers to: the folder of a run, an adapter or a model, or a hub id of a model.

    `overrides` are settings that have changed since, such as the device or the place of the base.

    Raises:
        InputError: there is no such artifact, or a run has no trained weights yet.
    """
    folder = as_path(name, InputError)
    if (folder / "run.json").is_file():
        return _of_run(name, folder, overrides)
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise InputError(f"{name} does not exist; give a run directory, an adapter folder or a model folder")
    on = load_recipe(None, overrides).model
    if (folder / "adapter_config.json").is_file():
        return _of_adapter(name, folder, on)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{name} is neither a run (run.json) nor an adapter (adapter_config.json) nor a model (config.json); "
            "give the folder of one of them"
        )
    section = on.model_copy(update={"model_name_or_path": name})
    source = find_model(section)
    return _noted(name, source.folder, section, section, "qlora" if source.is_4bit else "lora", is_adapter=False)


def source_of(tuned: Artifact, section: ModelSection | None = None) -> ModelSource:
    """The model that the artifact stands on, or the one that `section` of it names.

    Raises:
        ModelError, CannotRunError: it is missing; the message says how to name another place.
    """
    section = section or tuned.base
    try:
        return find_model(section)
    except (ModelError, CannotRunError) as error:
        if not tuned.is_adapter:
            raise
        raise type(error)(f"{tuned.name}: its base: {error} (--model_name_or_path says where it is now)") from error


def check_original(tuned: Artifact, source: ModelSource) -> None:
    """Check that `source` is the model that the artifact was trained on, by every byte of its weights.

    Hashing takes 0.64 s of a processor for each GB; with the cache, only after a file has changed.

    Raises:
        ModelError: it is another model, or some of its weights have changed.
    """
    if tuned.fingerprint and source.fingerprint != tuned.fingerprint:
        raise ModelError(
            f"{tuned.name} was trained on a model of fingerprint {tuned.fingerprint[:12]}, {source.name} has "
            f"{source.fingerprint[:12]}; it is another model; set --model_name_or_path to the right one"
        )
    if tuned.weights_hash and weights_hash(source.folder, hash_of(tuned.quantization)) != tuned.weights_hash:
        raise ModelError(
            f"{source.name}: some of its weights have changed since {tuned.name} was trained on it; download it again, "
            "or set --model_name_or_path to an unchanged copy"
        )


def load_artifact(tuned: Artifact, device: Device) -> tuple[Any, Any, torch.dtype]:
    """The model with its adapter, its tokenizer and its compute type, ready to answer.

    Raises:
        ModelError: the base is missing, is another model, or does not fit the adapter.
    """
    dtype, _notes = compute_dtype(tuned.quantization.bnb_4bit_compute_dtype, device)
    source = source_of(tuned)
    if tuned.is_adapter and tuned.base == tuned.original:
        check_original(tuned, source)
    tokenizer = tokenizer_of(tuned, source)
    model, _report = load_model(source, tuned.method, tuned.base, tuned.quantization, device)
    return (load_adapter(model, tuned.folder) if tuned.is_adapter else model), tokenizer, dtype


def tokenizer_of(tuned: Artifact, source: ModelSource) -> Any:
    """The tokenizer next to the weights, with the chat template of the training; or that of the base."""
    own = tuned.base.model_copy(update={"tokenizer_name_or_path": str(tuned.folder)})
    embeddings, _head = embeddings_and_head(model_without_weights(source.config))
    try:
        n_embeddings = read_adapter(tuned.folder).n_embeddings(embeddings) if tuned.is_adapter else 0
        return load_tokenizer(source, own, n_embeddings)
    except ModelError:
        return load_tokenizer(source, tuned.base)


def _of_run(name: str, folder: Path, overrides: Mapping[str, Any] | None) -> Artifact:
    record, run = read_record(folder), RunDirectory(folder)
    check_links(folder)
    trained = stored_recipe(record, folder)
    recipe = load_recipe(folder / "recipe.yaml", overrides) if overrides else trained
    if recipe.model.trust_remote_code and not load_recipe(None, overrides).model.trust_remote_code:
        raise ModelError(
            f"{name}: its model runs Python code of its own, and another person may have made the run; read that "
            "code, then set --trust_remote_code"
        )
    is_adapter = recipe.method != "full"
    weights = run.adapter if is_adapter else run.full_model
    if not weights.is_dir():
        raise InputError(f"{name} contains no trained weights ({weights.name}/); {_why_without_weights(record)}")
    if not isinstance(record["rows"].get("ledger"), dict):
        raise InputError(f"{folder}/run.json is damaged (no ledger); give another run")
    note = _note(folder / "run.json", record["rows"]["ledger"])
    base = str(weights) if not is_adapter else str(run.base) if run.base.is_dir() else None
    return Artifact(
        name=name,
        folder=weights,
        is_adapter=is_adapter,
        method=recipe.method if is_adapter else "lora",
        base=recipe.model.model_copy(update={"model_name_or_path": base}) if base else recipe.model,
        original=recipe.model,
        quantization=as_trained(trained.quantization, record["model"]),
        init=trained.lora.init_lora_weights,
        form=note.prompt_form,
        stop_tokens=note.stop_tokens,
        fingerprint=record["model"].get("fingerprint"),
        weights_hash=record["model"].get("weights_hash"),
        clock=clock_of(record),
    )


def _why_without_weights(record: Mapping[str, Any]) -> str:
    notes = record.get("notes")
    last = f": {notes[-1]}" if isinstance(notes, list) and notes and record["status"] == "failed" else ""
    return {
        "running": "the run goes on: wait for it",
        "killed": "its process was killed: continue it with nybble train --resume",
        "stopped": "it was stopped: continue it with nybble train --resume",
        "failed": f"the run failed{last}; mend that, then train again",
    }.get(record["status"], "they were removed since the run was done; give another run")


def _of_adapter(name: str, folder: Path, on: ModelSection) -> Artifact:
    named = read_settings(folder).base_model_name_or_path
    base = on.model_name_or_path or named
    if not base:
        raise ModelError(
            f"{folder}/adapter_config.json does not name the base model; say where it is with --model_name_or_path"
        )
    section = on.model_copy(update={"model_name_or_path": base})
    return _noted(name, folder, section, section, "qlora", is_adapter=True)


def _note(file: Path, content: Any) -> _Note:
    try:
        return _Note.model_validate(content)
    except ValidationError as error:
        raise ModelError(f"{file} is damaged ({first_fault(error)}); repair or remove it") from error


def _noted(
    name: str, folder: Path, base: ModelSection, original: ModelSection, method: str, *, is_adapter: bool
) -> Artifact:
    """The artifact in `folder`, with what its `nybble.json` says about it."""
    file = folder / NOTE
    note = _note(file, read_object(file, ModelError, "remove it") if file.is_file() else {})
    return Artifact(
        name=name,
        folder=folder,
        is_adapter=is_adapter,
        method=(note.method or method) if is_adapter else method,
        base=base,
        original=original,
        quantization=note.quantization,
        init=note.init_lora_weights,
        form=note.prompt_form,
        stop_tokens=note.stop_tokens,
        fingerprint=note.base_fingerprint if is_adapter else None,
        weights_hash=note.base_hash if is_adapter else None,
        clock=note.clock,
    )
