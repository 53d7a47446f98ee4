"""The model of a run: its base loaded, whole or in shards, fitted to the rows if asked for, and adapters attached."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from nybble.job import Job
from nybble.kernels import dispatcher
from nybble.models import (
    LoadReport,
    Starts,
    attach,
    calibrate,
    count_parameters,
    find_model,
    held_bytes,
    load_in_shards,
    load_model,
    needs_calibration,
    put_weights_back,
    save_adapter,
    save_whole,
)
from nybble.storage.atomic import atomic_folder
from nybble.training import Witness, stop_at


def load_for_training(job: Job, witness: Witness) -> tuple[Any, torch.dtype]:
    """The model as it is trained, and the type it computes in; `witness` learns how it was loaded.

    Raises:
        InputError, CannotRunError: the weights cannot be used, or rows to calibrate on are missing.
    """
    if job.in_shards:
        model, dtype = _in_shards(job, witness)
    else:
        base, dtype, starts = _base(job, witness)
        model = _attach(job, base, starts)
    trainable, total = count_parameters(model)
    witness.record.trainable_parameters, witness.record.total_parameters = trainable, total
    job.watch.note(f"trains {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    return model, dtype


def _base(job: Job, witness: Witness) -> tuple[Any, torch.dtype, Starts]:
    job.watch.stage("load")
    recipe = job.recipe
    kept = job.processes.gather(job.run.base.is_dir())[0]  # a resumed run goes on with the base that it began with
    section = recipe.model.model_copy(update={"model_name_or_path": str(job.run.base)}) if kept else recipe.model
    source = find_model(section) if kept else job.source
    with witness.phase("load"):
        model, loaded = load_model(source, recipe.method, section, recipe.quantization, job.device)
    stop_at(model, job.prepared.ledger.stop_tokens)
    _report_load(job, witness, loaded, model.device)
    starts: Starts = {}
    if recipe.method == "qlora" and needs_calibration(recipe.quantization, recipe.lora) and not kept:
        starts = _calibrate(job, witness, model)
    return model, getattr(torch, loaded.compute_dtype), starts


def _in_shards(job: Job, witness: Witness) -> tuple[Any, torch.dtype]:
    job.watch.stage("load")
    with witness.phase("load"):
        model, dtype, loaded = load_in_shards(job.source, job.recipe, job.device, job.source.name, job.processes)
    stop_at(model.get_base_model(), job.prepared.ledger.stop_tokens)
    _report_load(job, witness, loaded, job.device.torch_device)
    held = job.processes.gather(held_bytes(model))
    witness.record.model["held_bytes"] = held  # of weights, by process
    job.watch.note(f"in shards: each of {len(held)} processes holds at most {max(held):,} bytes of weights")
    return model, dtype


def _report_load(job: Job, witness: Witness, loaded: LoadReport, place: torch.device) -> None:
    witness.record.model |= {**asdict(loaded), "fingerprint": job.source.fingerprint}
    witness.record.notes += loaded.notes
    if loaded.n_packed:
        choices = dispatcher.choices(place)
        witness.record.paths = {operator: choice.backend for operator, choice in choices.items()}
        witness.record.notes += dict.fromkeys(choice.reason for choice in choices.values() if choice.reason)
    if job.recipe.model.attn_implementation != "sdpa":  # it is not torch's to choose from
        witness.record.paths.pop("sdpa", None)
    for note in loaded.notes:
        job.watch.note(note)
    if loaded.bits_per_weight is not None:
        job.watch.note(
            f"{loaded.n_packed} linears in {loaded.bits_per_weight:.3f} bits a weight ({loaded.packed_bytes:,} bytes)"
        )


def _calibrate(job: Job, witness: Witness, model: Any) -> Starts:
    """Pack anew, fitted to the rows; the base is kept in the run, since loading would not give it again."""
    recipe, section = job.recipe, job.recipe.quantization
    rows = job.prepared.calibration_rows(section.calibration_rows)
    with witness.phase("calibrate"):
        done = calibrate(model, job.source, rows, section, recipe.lora, partial(job.watch.progress, "calibrating"))
        if job.processes.is_main:
            save_whole(job.run.base, model, job.tokenizer)
    witness.record.model["calibration"] = {"rows": done.n_rows, "tokens": done.n_tokens, "left": done.left}
    on = f"calibrated on {done.n_rows:,} rows ({done.n_tokens:,} tokens)" if done.n_rows else "adapters started"
    job.watch.note(f"{on}; the base is kept in {job.run.base}")
    return done.starts


def _attach(job: Job, model: Any, starts: Starts) -> Any:
    if job.recipe.method != "full":
        torch.manual_seed(job.recipe.training.seed)  # the adapters' first values
        base_name = str(job.run.base.resolve()) if job.run.base.is_dir() else job.source.name
        model = attach(model, job.recipe.lora, base_name, starts)
        kept = job.run.base / "start"  # what no other start gives again
        if starts and job.processes.is_main:
            with atomic_folder(kept) as folder:
                save_adapter(model, folder)
        elif kept.is_dir() and not starts:
            put_weights_back(model, load_file(kept / "adapter_model.safetensors"))
    return model
