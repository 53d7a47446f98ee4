"""The second stage of a run: its base loaded, whole or in shards, calibrated if asked for, and adapters attached."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from nybble.kernels import dispatcher
from nybble.models import (
    CalibratedBase,
    LoadReport,
    Starts,
    attach,
    calibrate,
    compute_dtype,
    count_parameters,
    find_model,
    held_bytes,
    load_in_shards,
    load_model,
    needs_calibration,
    put_weights_back,
    save_adapter,
    save_whole,
    start_from,
)
from nybble.preparation import RunInputs, trains_in_shards
from nybble.run.context import RunContext
from nybble.storage.atomic import atomic_folder
from nybble.training import RunRecorder, stop_at


@dataclass(frozen=True)
class TrainableModel:
    """A model as it is trained: the base, with adapters unless every parameter is trained."""

    module: Any
    compute_dtype: torch.dtype  # of its arithmetic


def load(run: RunContext, inputs: RunInputs, recorder: RunRecorder) -> TrainableModel:
    """Load the model of a run; how it was loaded goes into the run's record.

    Raises:
        InputError, CannotRunError: the weights cannot be used, or rows to calibrate on are missing.
    """
    run.observer.stage("load")
    if trains_in_shards(inputs.recipe, run.processes):
        model = _load_sharded(run, inputs, recorder)
    else:
        model = _load_whole(run, inputs, recorder)
    trainable, total = count_parameters(model.module)
    recorder.record.trainable_parameters = trainable
    recorder.record.total_parameters = total
    run.observer.note(f"trains {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    return model


def _load_whole(run: RunContext, inputs: RunInputs, recorder: RunRecorder) -> TrainableModel:
    recipe = inputs.recipe
    section = recipe.model
    source = inputs.source
    base = run.directory.base
    has_own_base = run.processes.gather(base.is_dir())[0]  # a resumed run continues with the base that it calibrated
    if has_own_base:
        section = section.model_copy(update={"model_name_or_path": str(base)})
        source = find_model(section)
    calibrated = None
    if recipe.method == "qlora" and needs_calibration(recipe.quantization, recipe.lora) and not has_own_base:
        rows = inputs.rows.calibration_rows(recipe.quantization.calibration_rows)
        dtype, _ = compute_dtype(recipe.quantization.bnb_4bit_compute_dtype, run.device)
        calibrated = CalibratedBase(source, rows, recipe.quantization, recipe.lora, dtype)
    with recorder.phase("load"):
        found = None if calibrated is None else calibrated.folder
        module, report = load_model(
            source, recipe.method, section, recipe.quantization, run.device, packed_folder=found
        )
    stop_at(module, inputs.rows.ledger.stop_tokens)
    _record_loading(run, inputs, recorder, report, module.device)

    starts = {} if calibrated is None else _calibrate(run, inputs, recorder, module, calibrated)
    if recipe.method != "full":
        module = _attach(run, inputs, module, starts)
    return TrainableModel(module, getattr(torch, report.compute_dtype))


def _load_sharded(run: RunContext, inputs: RunInputs, recorder: RunRecorder) -> TrainableModel:
    with recorder.phase("load"):
        module, dtype, report = load_in_shards(
            inputs.source, inputs.recipe, run.device, base_name=inputs.source.name, processes=run.processes
        )
    stop_at(module.get_base_model(), inputs.rows.ledger.stop_tokens)
    _record_loading(run, inputs, recorder, report, run.device.torch_device)
    held = run.processes.gather(held_bytes(module))
    recorder.record.model["held_bytes"] = held  # bytes of weights, by process
    run.observer.note(f"in shards: each of {len(held)} processes holds at most {max(held):,} bytes of weights")
    return TrainableModel(module, dtype)


def _record_loading(
    run: RunContext, inputs: RunInputs, recorder: RunRecorder, report: LoadReport, device: torch.device
) -> None:
    record = recorder.record
    record.model |= {**asdict(report), "fingerprint": inputs.source.fingerprint}
    record.notes += report.notes
    if report.n_packed:
        choices = dispatcher.choices(device)
        record.paths = {operator: choice.backend for operator, choice in choices.items()}
        record.notes += dict.fromkeys(choice.reason for choice in choices.values() if choice.reason)
    if inputs.recipe.model.attn_implementation not in ("auto", "sdpa"):  # torch then has no choice
        record.paths.pop("sdpa", None)
    for note in report.notes:
        run.observer.note(note)
    if report.bits_per_weight is not None:
        run.observer.note(
            f"{report.n_packed} matrices in {report.bits_per_weight:.3f} bits per weight "
            f"({report.packed_bytes:,} bytes)"
        )


def _calibrate(run: RunContext, inputs: RunInputs, recorder: RunRecorder, module: Any, kept: CalibratedBase) -> Starts:
    """Pack the base again, fitted to the rows. It is saved in the run, because loading would not give it again."""
    section = inputs.recipe.quantization
    rows = inputs.rows.calibration_rows(section.calibration_rows)
    progress = partial(run.observer.progress, "calibrating")
    with recorder.phase("calibrate"):
        if kept.folder is not None:
            result = kept.figures()
            run.observer.note("the calibrated base is taken from the cache")
        else:
            result = calibrate(module, inputs.source, rows, section, inputs.recipe.lora, progress)
        if run.processes.is_main:
            why_not = kept.keep(module, result)
            if why_not:
                run.observer.note(f"the calibrated base {why_not}")
            save_whole(run.directory.base, module, inputs.tokenizer, inputs.source)
    if result.left:
        run.observer.note(f"{len(result.left)} modules were not calibrated and keep other scales, as {result.left[0]}")
    recorder.record.model["calibration"] = {"rows": result.n_rows, "tokens": result.n_tokens, "left": result.left}
    what = f"calibrated on {result.n_rows:,} rows ({result.n_tokens:,} tokens)" if result.n_rows else "adapters started"
    run.observer.note(f"{what}; the base is kept in {run.directory.base}")
    return result.starts


def _attach(run: RunContext, inputs: RunInputs, module: Any, starts: Starts) -> Any:
    base = run.directory.base
    start = base / "start"  # the adapters' first values, if calibration chose them
    torch.manual_seed(inputs.recipe.training.seed)  # of the adapters' first values
    base_name = str(base.resolve()) if base.is_dir() else inputs.source.name
    module = attach(module, inputs.recipe.lora, base_name, starts, inputs.tokens)
    if inputs.recipe.lora.adapter_name_or_path:
        start_from(module, inputs.recipe.lora.adapter_name_or_path)
    if starts and run.processes.is_main:
        with atomic_folder(start) as folder:
            save_adapter(module, folder)
    elif start.is_dir() and not starts:
        put_weights_back(module, load_file(start / "adapter_model.safetensors"))
    return module
