"""Merging an adapter into its base. The best base is measured, and the result is verified before it gets its name.

    dequantized   the packed base that the adapter was trained on, decoded: the same function up to one rounding
    original      the 16-bit model: better after short runs, worse after long ones, so both are tried
    4bit          each of the two with the adapter added, packed again by the calibrated encoder, whatever encoder the
                  base had: the original keeps small adapters, which rounding the decoded base again would lose; the
                  decoded base is right after long runs, which have learned to compensate for it

Candidates are written beside the destination and measured by `nybble.exporting.verify`; the best one is renamed.
"""

from __future__ import annotations

import gc
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from nybble.data import Example, Prepared, examine_rows, fixed_clock, supervised
from nybble.errors import CannotRunError, InputError, ModelError, RecipeError
from nybble.exporting.arithmetic import AdapterDelta, merged_bytes, write_merged
from nybble.exporting.card import merged_card
from nybble.exporting.verify import TEXTS, Limits, Reference, Verification
from nybble.guard import read_object
from nybble.hardware import Device, detect_device
from nybble.models import (
    CONFIG,
    NOTE,
    Artifact,
    BaseWeights,
    ModelSource,
    calibrate,
    check_original,
    complete,
    find_artifact,
    find_model,
    load_artifact,
    load_model,
    save_whole,
    source_of,
    tokenizer_of,
    tower_bytes,
)
from nybble.recipe import LoraSection, Recipe, load_recipe, stored_recipe
from nybble.run.directory import read_lines, read_record, to_json
from nybble.run.progress import ObserverChoice, watching
from nybble.run.record import Evaluation, Observer
from nybble.storage.atomic import write_text
from nybble.training import evaluate, stop_at
from nybble.units import format_bytes

TARGETS = ("auto", "dequantized", "original", "4bit")
DTYPES = ("bfloat16", "float16", "float32")
UNVERIFIED = "UNVERIFIED"
ENCODER = "calibrated"  # packs the merged weights
_PACKED = "4bit-"  # followed by the base: a target that is packed again
_TOKENS_COMPARED = 2048  # learned ones, of the first held-out rows
_PACKED_SHARE = 0.5  # the most that a 4-bit folder takes of the 16-bit bytes: embeddings and head stay in 16 bits


@dataclass(frozen=True)
class _Merge:
    """A merge whose input has been checked."""

    tuned: Artifact
    recipe: Recipe
    is_run: bool  # else an adapter without its run
    out: Path
    dtype: torch.dtype
    device: Device
    bases: dict[str, BaseWeights]  # target -> the weights that the adapter is added to
    limits: Limits
    watch: Observer


def merge(
    run: Path | str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    *,
    into: str = "auto",
    dtype: str | None = None,
    limits: Limits | None = None,
    observer: ObserverChoice = "auto",
) -> dict[str, Any]:
    """Merge a run's adapter into its base, verify it, and write a whole model to the new folder `out`.

    Args:
        run: folder of a finished run or of an adapter, which another tool may have made.
        out: a folder that does not exist yet.
        overrides: settings of model, data and evaluation that have changed since, such as the place of the rows. An
            adapter without its run is compared on the rows that `dataset_name` gives, else on texts of our own.
        into: "dequantized", "original", "auto" (the better one of the two), or "4bit" (the better one, packed again).
        dtype: "bfloat16", "float16" or "float32"; by default the compute dtype of the run.
        limits: how far the merged model may be from the adapter on its base.
        observer: receives the progress; "auto" shows it where you are, None shows nothing.

    Returns:
        The target, the figures of every candidate, and `verified`. If that is false, the folder has a file UNVERIFIED.

    Raises:
        InputError: the run, the base or the settings do not allow the merge.
        CannotRunError: there is not enough disk or memory.
    """
    with watching(observer) as watch:
        return _merge(_prepare(Path(run), Path(out).expanduser(), overrides, into, dtype, limits or Limits(), watch))


def _merge(job: _Merge) -> dict[str, Any]:
    started = time.monotonic()
    with fixed_clock(job.tuned.clock):
        compared = find_rows(job.tuned, job.recipe, is_run=job.is_run, watch=job.watch)
    stops = job.tuned.stop_tokens
    with (
        fixed_clock(job.tuned.clock),
        Reference(compared.rows, job.recipe.evaluation.max_new_tokens, stops) as reference,
    ):
        candidates = _Candidates(job, *_ask_adapter(job, reference, compared))
        try:
            measured = [candidates.make(target, reference, compared.prepared) for target in job.bases]
            best = min(measured, key=lambda m: (not m.verified, m.loss))
            result = {
                "out": str(job.out),
                **best.to_json(),
                "dtype": str(job.dtype).removeprefix("torch."),
                "rows_held_out": compared.kind == "held-out",
                "rows": compared.kind,
                "candidates": [m.to_json() for m in measured],
                "file_bytes": sum(f.stat().st_size for f in candidates.folder(best.target).glob("*.safetensors")),
                "seconds": time.monotonic() - started,
            }
            candidates.finish(best, result)
        finally:
            candidates.discard()
    return result


def _prepare(
    run: Path,
    out: Path,
    overrides: Mapping[str, Any] | None,
    into: str,
    dtype: str | None,
    limits: Limits,
    watch: Observer,
) -> _Merge:
    if into not in TARGETS:
        raise RecipeError(f"into: got {into!r}; allowed: {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype: got {dtype!r}; allowed: {', '.join(DTYPES)}")
    if out.exists():
        raise InputError(f"{out} already exists; choose a new folder")
    tuned, recipe, is_run = tuned_now(run, overrides, watch)
    if not tuned.is_adapter:
        how = "trained every parameter (method full)" if is_run else "holds no adapter"
        raise InputError(f"{run} {how}: {tuned.folder} is the whole model already")
    if into == "4bit" and not recipe.data.dataset_name:
        raise RecipeError("packing in 4 bits reads rows; give some with --dataset_name")
    device = detect_device(recipe.model.device)
    chosen = getattr(torch, dtype or tuned.quantization.bnb_4bit_compute_dtype)
    job = _Merge(tuned, recipe, is_run, out, chosen, device, _bases(tuned, into, watch), limits, watch)
    _check_disk(job)
    return job


def tuned_now(run: Path, overrides: Mapping[str, Any] | None, watch: Observer) -> tuple[Artifact, Recipe, bool]:
    """The adapter, its run's recipe with the overrides, and whether it has a run.

    Settings that decided the training cannot be changed afterwards. An adapter of another tool does not say how its
    base was packed, if it was: the overrides may.
    """
    is_run = not (run / CONFIG).is_file()
    before = stored_recipe(read_record(run), run) if is_run else Recipe()
    now = load_recipe(run / "recipe.yaml" if is_run else None, overrides)
    tuned = find_artifact(str(run), overrides)
    is_foreign = not is_run and not (tuned.folder / NOTE).is_file()
    for name in ("lora", "training") if is_foreign else ("method", "quantization", "lora", "training"):
        if getattr(now, name) != getattr(before, name):
            raise RecipeError(f"{name} is fixed by the run and cannot be changed while merging; remove it")
    if is_run:
        return tuned, now, is_run
    if is_foreign:
        tuned = replace(tuned, quantization=now.quantization)
        says_how = {"method", "quantization"} & now.model_fields_set
        if not (says_how and now.method == "qlora") and not source_of(tuned).is_4bit:
            if now.method == "full":
                raise RecipeError("method: an adapter was trained with lora or qlora; give one of them")
            if not says_how:
                watch.note(
                    "the adapter does not say how its base was packed, so it is taken to be trained on 16 bits; "
                    "--method qlora says that it was trained on 4, packed as the settings of quantization say"
                )
            tuned = replace(tuned, method="lora")
    return tuned, now.model_copy(update={"model": tuned.original, "quantization": tuned.quantization}), is_run


def _bases(tuned: Artifact, into: str, watch: Observer) -> dict[str, BaseWeights]:
    """The bases that `into` asks for and that the adapter can be merged into."""
    if tuned.method == "lora":
        if into in ("dequantized", "4bit"):
            raise RecipeError(
                "method lora trained on a 16-bit base: merge into original; for 4 bits, nybble quantize the result"
            )
        source = source_of(tuned)
        check_original(tuned, source)
        return {"original": BaseWeights(source)}
    if tuned.is_repaired and into == "original":
        raise RecipeError(
            f"the adapter was initialised with the quantization error (init_lora_weights {tuned.init}), so it fits "
            "only its own 4-bit base; merge into dequantized"
        )
    found: dict[str, BaseWeights] = {}
    prefix = _PACKED if into == "4bit" else ""
    if into != "original":
        found[f"{prefix}dequantized"] = _trained_base(tuned)
    if into == "dequantized" or tuned.is_repaired:
        return found
    try:
        source = _original(tuned)
    except (ModelError, CannotRunError) as error:
        if into == "original":
            raise
        watch.note(f"only the dequantized base is tried: {error}")
        return found
    return found | {f"{prefix}original": BaseWeights(source)}


def _original(tuned: Artifact) -> ModelSource:
    source = source_of(tuned, tuned.original)
    check_original(tuned, source)
    if source.is_4bit:
        raise ModelError(f"{source.name} is stored in 4 bits; the 16-bit original is not available")
    return source


def _trained_base(tuned: Artifact) -> BaseWeights:
    """The packed base that the adapter was trained on, decoded."""
    source = source_of(tuned)
    if tuned.base == tuned.original:
        check_original(tuned, source)
    return BaseWeights(source, tuned.quantization, getattr(torch, tuned.quantization.bnb_4bit_compute_dtype))


def _check_disk(job: _Merge) -> None:
    sizes = {}
    for target, weights in job.bases.items():
        with weights as base:
            sizes[target] = merged_bytes(base, job.dtype) + tower_bytes(base.original)
    packed = sum(int(_PACKED_SHARE * size) for target, size in sizes.items() if target.startswith(_PACKED))
    needed = (
        packed + max(sizes.values()) if packed else sum(sizes.values())
    )  # the 16-bit folder is removed after packing
    place = next(p for p in job.out.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        several = "; --into dequantized needs half" if len(job.bases) > 1 else ""
        raise CannotRunError(
            f"merging writes {format_bytes(needed)} to {place}, which has {format_bytes(free)} left; free disk, or "
            f"choose another --out{several}"
        )


@dataclass(frozen=True)
class Compared:
    """What the adapter on its base and the merged model are compared on."""

    kind: str  # "held-out", "trained", "given" or "built-in"
    rows: Sequence[Example]
    prepared: Prepared | None  # the rows that packing in 4 bits reads


def find_rows(tuned: Artifact, recipe: Recipe, *, is_run: bool, watch: Observer) -> Compared:
    """The run's held-out rows, else those that it was trained on; without a run those that are given, else our own."""
    watch.stage("rows")
    tokenizer = tokenizer_of(tuned, source_of(tuned))
    if not recipe.data.dataset_name:
        watch.note("no rows are given, so the comparison uses texts of our own; --dataset_name takes yours")
        ids = [tokenizer(text).input_ids for text in TEXTS]
        whole: dict[str, Any] = {"n_answers": 0, "n_stops": 0, "n_cut_stops": 0, "n_empty": 0, "last_answer_start": 0}
        rows = [Example(one, one, stop_tokens=(), is_truncated=False, **whole) for one in ids]
        return Compared("built-in", rows, None)
    data = recipe.data if is_run else recipe.data.model_copy(update={"eval_fraction": 0.0})
    objective = recipe.preferences.objective
    prepared = examine_rows(data, recipe.evaluation, tokenizer, recipe.training.seed, objective=objective)
    if not is_run:
        return Compared("given", supervised(prepared.train), prepared)
    if prepared.held_out:
        return Compared("held-out", supervised(prepared.held_out), prepared)
    watch.note("no rows were held out, so the comparison uses rows that were trained on")
    return Compared("trained", supervised(prepared.train), prepared)


def _ask_adapter(job: _Merge, reference: Reference, compared: Compared) -> tuple[Any, Any]:
    """Store the answers of the adapter on its base; return its generation config and tokenizer."""
    job.watch.stage("reference")
    model, tokenizer, dtype = load_artifact(job.tuned, job.device)
    stop_at(model, job.tuned.stop_tokens)
    if compared.kind == "held-out":
        _check_against_run(job, compared.rows, partial(evaluate, model, tokenizer, compute_dtype=dtype))
    reference.capture(model, tokenizer, dtype)
    generation = model.generation_config
    del model
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    return generation, tokenizer


def _check_against_run(job: _Merge, rows: Sequence[Example], evaluated: Callable[..., Evaluation | None]) -> None:
    """Check that the adapter on its base has the loss that its run measured on the same held-out rows.

    Whatever has changed since, base, adapter or the library's arithmetic, merging would keep it and find no difference.

    Raises:
        ModelError: the losses differ by more than the limit.
    """
    recorded = [line["tuned"] for line in read_lines(Path(job.tuned.name) / "held_out.jsonl")]
    n_tokens = list(accumulate(row.n_trained for row in rows))
    n_rows = max(1, bisect_right(n_tokens, _TOKENS_COMPARED))
    then = recorded[:n_rows]
    chosen = [replace(row, answer=None) for row in rows[:n_rows]]
    if [(row.row, row.n_trained) for row in chosen] != [(line["row"], line["n_tokens"]) for line in then]:
        job.watch.note("the held-out rows are not those of the run, so its loss on them is not compared")
        return
    section = job.recipe.evaluation.model_copy(update={"per_device_eval_batch_size": 1})
    measured = evaluated(examples=chosen, section=section)
    expected = sum(line["loss"] for line in then) / sum(line["n_tokens"] for line in then)
    if measured is not None and not abs(measured.loss - expected) <= job.limits.loss_gap:
        raise ModelError(
            f"{job.tuned.name}: the adapter on its base has a loss of {measured.loss:.4f} on held-out rows, and "
            f"its run measured {expected:.4f}; base or adapter have changed since, restore them or train again"
        )


class _Candidates:
    """The merged models that are tried, each in a hidden folder beside the destination."""

    def __init__(self, job: _Merge, generation: Any, tokenizer: Any) -> None:
        self.job = job
        self.generation = generation
        self.tokenizer = tokenizer

    def folder(self, target: str) -> Path:
        return self.job.out.with_name(f".{self.job.out.name}.{target}.partial")

    def make(self, target: str, reference: Reference, prepared: Prepared | None) -> Verification:
        """Write one candidate and measure it."""
        job = self.job
        folder = self.folder(target)
        job.watch.stage(f"merge into {target}")
        self._write_16bit(target, folder)
        if target.startswith(_PACKED) and prepared is not None:
            self._pack(folder, prepared)
        job.watch.stage(f"verify {target}")
        measured = reference.measure(folder, target, job.limits, job.device.type)
        job.watch.note(
            f"{target}: mean KL {measured.mean_kl:.5f}, worst {measured.worst_kl:.4f}, loss {measured.loss:.4f} "
            f"({measured.loss_gap:+.4f} compared with the adapter on its base)"
        )
        return measured

    def _write_16bit(self, target: str, folder: Path) -> None:
        job = self.job
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with job.bases[target] as base, AdapterDelta(job.tuned.folder) as delta:
            progress = partial(job.watch.progress, f"merging into {target}")
            changes = write_merged(base, delta, folder, job.dtype, progress)
            source = base.original
        changes["eos_token_id"] = self.generation.eos_token_id
        saved = {"dtype": str(job.dtype).removeprefix("torch.")}
        if source.is_multimodal:
            complete(folder, source, saved, changes)
        else:
            # The base's own file: not every config that transformers writes is one that it reads.
            content = read_object(source.folder / "config.json", ModelError, "download it again") | changes | saved
            for name in ("quantization_config", "torch_dtype", "_name_or_path"):  # it is no longer packed, nor there
                content.pop(name, None)
            write_text(folder / "config.json", to_json(content, indent=2) + "\n")
        # Not save_pretrained, which refuses what some bases have, such as a temperature without sampling.
        write_text(folder / "generation_config.json", self.generation.to_json_string() + "\n")
        self.tokenizer.save_pretrained(folder)

    def _pack(self, folder: Path, prepared: Prepared) -> None:
        """Replace the 16-bit folder by its 4-bit form."""
        job = self.job
        job.watch.stage("pack")
        whole = folder.with_name(f"{folder.name}.16bit")
        shutil.rmtree(whole, ignore_errors=True)
        folder.rename(whole)
        quantization = job.recipe.quantization.model_copy(update={"cache": False, "encoder": ENCODER})
        section = job.recipe.model.model_copy(update={"model_name_or_path": str(whole), "model_revision": None})
        source: ModelSource = find_model(section)
        model, _report = load_model(source, "qlora", section, quantization, job.device)
        rows = prepared.calibration_rows(quantization.calibration_rows)
        calibrate(model, source, rows, quantization, LoraSection(), partial(job.watch.progress, "calibrating"))
        model.generation_config = self.generation
        save_whole(folder, model, self.tokenizer, source)
        shutil.rmtree(whole)

    def finish(self, best: Verification, result: dict[str, Any]) -> None:
        """Complete the best candidate with its card and notes, and rename it to the destination."""
        job = self.job
        folder = self.folder(best.target)
        write_text(folder / "merge.json", to_json(result, indent=1) + "\n")
        write_text(folder / "README.md", merged_card(job.tuned.folder / "README.md", result))
        note = job.tuned.folder / NOTE
        if note.is_file():
            shutil.copyfile(note, folder / NOTE)
        if not best.verified:
            write_text(folder / UNVERIFIED, "".join(f"{fault}\n" for fault in best.faults))
        folder.rename(job.out)

    def discard(self) -> None:
        """Remove the candidates that were not chosen."""
        for folder in self.job.out.parent.glob(f".{self.job.out.name}.*.partial*"):
            shutil.rmtree(folder, ignore_errors=True)
