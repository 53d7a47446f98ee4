"""Exports a run: to a file for llama.cpp, which is read back and compared, a folder for Ollama, or a hub repository."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.data import fixed_clock
from nybble.errors import CannotRunError, InputError, NybbleError, RecipeError
from nybble.exporting.arithmetic import merged_bytes
from nybble.exporting.fresh import run_fresh
from nybble.exporting.gguf import TYPES, check_gguf, limits_of, write_adapter_gguf, write_gguf
from nybble.exporting.importance import measure_importance
from nybble.exporting.merging import UNVERIFIED, Compared, find_rows, merge, tuned_now
from nybble.exporting.mixes import MIXES, read_types
from nybble.exporting.ollama import modelfile
from nybble.exporting.quantized import quantized_card, quantized_figures
from nybble.exporting.served import check_server
from nybble.exporting.verify import TEXTS
from nybble.exporting.vocabulary import read_vocabulary, says_alike
from nybble.models import (
    Artifact,
    BaseWeights,
    ModelSource,
    find_artifact,
    find_model,
    push_folder,
    source_of,
    tokenizer_of,
)
from nybble.recipe import load_recipe
from nybble.run.progress import ObserverChoice, watching
from nybble.run.record import Observer
from nybble.storage.atomic import atomic_folder, remove_left_overs
from nybble.units import format_bytes

# The largest mean KL, in nats a position, between the folder and the file as stock transformers reads both. float16 and
# bfloat16 only round once more.
MOST_KL = {"f16": 0.001, "bf16": 0.001, "q8_0": 0.02}
MOST_KL |= {"Q6_K": 0.05, "Q5_K": 0.1, "Q4_K": 0.3, "Q3_K": 1.0}  # of a mix: that of its most frequent type
ADAPTER = "adapter"
LLAMA_CPP = "llama.cpp"
_BYTES = {"f16": 2, "bf16": 2, "q8_0": 1.0625, "Q6_K": 0.9, "Q5_K": 0.8, "Q4_K": 0.75, "Q3_K": 0.7}


@dataclass(frozen=True)
class _Whole:
    """A model without adapters, ready to be exported."""

    source: ModelSource
    tokenizer: Any
    form: str
    stop_tokens: tuple[int, ...]
    texts: list[str]  # the texts that folder and file are compared on
    notes: tuple[str, ...]  # what GGUF cannot express
    clock: datetime | None = None  # that chat templates are told
    importance: Mapping[str, Tensor] | None = None  # of the columns of each weight, on the rows


def export(  # noqa: C901 - one check after another
    tuned: Path | str,
    overrides: Mapping[str, Any] | None = None,
    *,
    gguf: Path | str | None = None,
    gguf_type: str = "f16",
    quantize: str | None = None,
    ollama: Path | str | None = None,
    hub: str | None = None,
    check: str | None = None,
    server_model: str | None = None,
    observer: ObserverChoice = "auto",
) -> dict[str, Any]:
    """Export a run, an adapter or a merged model. A run is merged first if a whole model is needed.

    Args:
        tuned: the folder of a run, of an adapter or of a whole model.
        overrides: settings that have changed since, such as the place of the base.
        gguf: the file to write.
        gguf_type: the type of the matrices, "f16", "bf16" or "q8_0"; or "adapter", which exports only the adapter.
        quantize: instead of `gguf_type` one of llama.cpp's mixes, as "Q4_K_M", or several with commas between them;
            then each file has its type in its name.
        ollama: a new folder for a GGUF file and a Modelfile.
        hub: the name of a repository, which is created as private if it is new. `tuned` is uploaded as it is.
        check: "llama.cpp" has it compute the GGUF files on the held-out rows as well; an address asks the server there
            whether it answers as the tuned model does.
        server_model: the name that the model has on that server; needed where it serves several.
        observer: receives the progress; "auto" shows it where you are, None shows nothing.

    Returns:
        What was written, the figures that were measured, and `verified`.

    Raises:
        InputError: there is nothing to export, or no destination.
        CannotRunError: a library, disk space or the hub is missing.
    """
    is_server = check is not None and check != LLAMA_CPP
    if not (gguf or ollama or hub or is_server):
        raise InputError("no destination given; give --gguf FILE, --ollama DIR or --hub NAME")
    if gguf_type not in (*TYPES, ADAPTER) or (gguf_type == ADAPTER and ollama):
        allowed = ", ".join(TYPES if ollama else (*TYPES, ADAPTER))
        raise RecipeError(f"gguf_type: got {gguf_type!r}; allowed: {allowed}")
    file = Path(gguf).expanduser() if gguf else None
    folder = Path(ollama).expanduser() if ollama else None
    types = read_types(quantize) if quantize is not None else []
    if types and (gguf_type != "f16" or file is None or folder is not None):
        raise RecipeError("quantize: goes with --gguf FILE, and without --gguf_type and --ollama")
    if is_server and (gguf or ollama):
        raise InputError(f"check: got {check!r}; {LLAMA_CPP} checks files, and a server is checked without --gguf")
    if server_model is not None and not is_server:
        raise InputError("server_model: goes with --check and the address of a server")
    if check == LLAMA_CPP:
        types = types or [gguf_type.upper()]
        if folder is not None or file is None or gguf_type == ADAPTER:
            raise InputError(f"check: {LLAMA_CPP} reads whole models; give --gguf FILE, and no --gguf_type {ADAPTER}")
        if find_spec("cyllama") is None:
            raise CannotRunError(f"{LLAMA_CPP} is not at hand; run pip install 'nybble[llama_cpp]'")
    files = _named(file, types) if file is not None and types else {}
    for path in (*(files.values() or (file,)), folder):
        if path is not None and path.exists():
            raise InputError(f"{path} already exists; choose a new name")
    with watching(observer) as watch:
        result: dict[str, Any] = {"verified": True}
        if files:
            result = _export_quantized(tuned, overrides, files, watch, in_llama_cpp=check == LLAMA_CPP)
        elif file is not None or folder is not None:
            result = _export(tuned, overrides, file, gguf_type, folder, watch)
        if hub is not None:
            found = find_artifact(str(tuned), overrides)
            _check_marked(found)
            watch.stage("upload")
            result["hub"] = push_folder(found.folder, hub)
        if check is not None and is_server:
            result["check"] = check_server(check, server_model, tuned, overrides, watch)
            result["verified"] = result["verified"] and result["check"]["verified"]
        return result


def _named(file: Path, types: Sequence[str]) -> dict[str, Path]:
    """The file of each type."""
    return {kind: file if len(types) == 1 else file.with_name(f"{file.stem}-{kind}{file.suffix}") for kind in types}


def _export(
    tuned: Path | str,
    overrides: Mapping[str, Any] | None,
    file: Path | None,
    gguf_type: str,
    folder: Path | None,
    watch: Observer,
) -> dict[str, Any]:
    found = find_artifact(str(tuned), overrides)
    _check_marked(found)
    result: dict[str, Any] = {"verified": True}
    if file is not None and gguf_type == ADAPTER:
        result |= {"adapter_gguf": str(file), **_adapter(found, file)}
    elif file is not None or folder is not None:
        beside = next(p for p in (file or folder or Path()).absolute().parents if p.exists())
        with tempfile.TemporaryDirectory(dir=beside, prefix=".nybble-export-") as scratch:
            whole = _whole(found, overrides, watch, scratch)
            if file is not None:
                result |= {"gguf": str(file), **_figures(_write_checked(whole, file, gguf_type, watch))}
            if folder is not None:
                result |= {"ollama": str(folder), **_figures(_write_ollama(whole, folder, gguf_type, watch))}
    return result


def _export_quantized(
    tuned: Path | str,
    overrides: Mapping[str, Any] | None,
    files: Mapping[str, Path],
    watch: Observer,
    *,
    in_llama_cpp: bool,
) -> dict[str, Any]:
    """Write a file of each type, with an importance matrix from the rows, and measure what each costs."""
    found = find_artifact(str(tuned), overrides)
    _check_marked(found)
    check_gguf(source_of(found))
    is_run = (Path(tuned) / "run.json").is_file()
    if is_run or found.is_adapter:
        found, recipe, is_run = tuned_now(Path(tuned), overrides, watch)
    else:
        recipe = load_recipe(None, overrides)
    place = next(p for p in next(iter(files.values())).absolute().parents if p.exists())
    done: dict[str, Any] = {"files": []}
    with tempfile.TemporaryDirectory(dir=place, prefix=".nybble-export-") as scratch:
        whole = _whole(found, overrides, watch, scratch)
        with fixed_clock(whole.clock):
            compared = find_rows(found, recipe, is_run=is_run, watch=watch)
        if any(kind in MIXES for kind in files):
            whole = _with_importance(whole, compared, recipe.quantization.calibration_rows, watch)
        for kind, file in files.items():
            outtype = kind if kind in MIXES else kind.lower()
            written = {"type": kind, "gguf": str(file), **_write_checked(whole, file, outtype, watch)}
            done["files"].append(written)
            for line in written["fallbacks"]:
                watch.note(line)
        watch.stage("measure")
        plain = _without_importance(whole, [kind for kind in files if kind in MIXES], Path(scratch), watch)
        quantized_figures(found, recipe, compared, whole.source.folder, done["files"], plain, in_llama_cpp=in_llama_cpp)
    for one in done["files"]:
        if faults := one.get("llama_cpp", {}).get("faults"):
            one["faults"] += faults
            one["verified"] = False
            _mark(Path(one["gguf"]), one["faults"])
    card = Path(done["files"][0]["gguf"]).with_suffix(".md")
    if not card.exists():
        card.write_text(quantized_card(Path(tuned).name, compared.kind, done["files"]), encoding="utf-8")
        done["card"] = str(card)
    done["verified"] = all(one["verified"] for one in done["files"])
    return done


def _figures(written: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in written.items() if name not in ("tensors", "fallbacks")}


def _check_marked(found: Artifact) -> None:
    if (found.folder / UNVERIFIED).exists():
        raise InputError(f"{found.folder} is marked {UNVERIFIED}, so it is not what was trained; merge again")


def _with_importance(whole: _Whole, compared: Compared, most: int, watch: Observer) -> _Whole:
    rows = compared.prepared.calibration_rows(most) if compared.prepared is not None else []
    if not rows:
        watch.note(
            "no rows are given, so all columns of a weight count alike; --dataset_name takes rows for an importance "
            "matrix"
        )
        return whole
    watch.stage("importance")
    return replace(
        whole, importance=measure_importance(whole.source.folder, rows, partial(watch.progress, "importance"))
    )


def _without_importance(
    whole: _Whole, mixes: Sequence[str], scratch: Path, watch: Observer
) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """The same files without an importance matrix, to show what it does; none where there is no matrix."""
    found = {}
    for mix in mixes if whole.importance is not None else ():
        file = scratch / f"plain-{mix}.gguf"
        progress = partial(watch.progress, "gguf without importance")
        tensors = write_gguf(whole.source, whole.tokenizer, whole.stop_tokens, file, mix, progress)
        found[mix] = (file, tensors)
    return found


def _whole(tuned: Artifact, overrides: Mapping[str, Any] | None, watch: Observer, scratch: str) -> _Whole:
    """The model as one folder. An adapter is merged into a temporary folder, which includes verifying it."""
    check_gguf(source_of(tuned))  # before any work
    if tuned.is_adapter:
        done = merge(tuned.name, Path(scratch) / Path(tuned.name).resolve().name, overrides, observer=watch)
        if not done["verified"]:
            raise NybbleError(f"not exported: the merged model is not what was trained ({'; '.join(done['faults'])})")
        tuned = find_artifact(done["out"])
    source = find_model(tuned.base)
    tokenizer = tokenizer_of(tuned, source)
    form = tuned.form or ("template" if tokenizer.chat_template else "plain")
    vocabulary = read_vocabulary(tokenizer, source.config.get_text_config().vocab_size)
    notes = (*vocabulary.notes, *limits_of(source))
    for note in notes:
        watch.note(note)
    texts = [text for text in TEXTS if not vocabulary.notes or says_alike(text, tokenizer)]
    return _Whole(source, tokenizer, form, tuned.stop_tokens, texts, notes, tuned.clock)


def _write_checked(whole: _Whole, file: Path, outtype: str, watch: Observer) -> dict[str, Any]:
    """Write a GGUF file, which gets its name once stock transformers has read it back."""
    watch.stage("gguf")
    with BaseWeights(whole.source) as base:
        _check_disk(file, int(merged_bytes(base, torch.float16) * _BYTES[MIXES.get(outtype, outtype)] / 2))
    unfinished = file.with_name(f".{file.stem}.partial.gguf")
    try:
        tensors = write_gguf(
            whole.source,
            whole.tokenizer,
            whole.stop_tokens,
            unfinished,
            outtype,
            partial(watch.progress, "gguf"),
            whole.importance,
        )
        watch.stage("verify")
        with tempfile.TemporaryDirectory(prefix="nybble-verify-") as scratch:
            asked = {"texts.json": whole.texts, "tensors.json": tensors}
            for name, content in asked.items():
                (Path(scratch) / name).write_text(json.dumps(content), encoding="utf-8")
            files = [Path(scratch) / name for name in asked]
            measured = run_fresh("stock_gguf.py", whole.source.folder, unfinished, *files)
        faults = _faults(measured, outtype)
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)
    if faults:
        _mark(file, faults)
    measured["notes"] = list(whole.notes)
    measured |= {"tensors": tensors, "fallbacks": _fallbacks(outtype, tensors)}
    return {**measured, "verified": not faults, "faults": faults, "file_bytes": file.stat().st_size}


def _fallbacks(mix: str, tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """What became of matrices whose rows are not whole blocks, in words."""
    changed = Counter((one["wanted"], one["type"]) for one in tensors if one.get("wanted"))
    return [
        f"{mix}: {n} matrices are {kind} instead of {wanted}, because their rows are not multiples of 256 weights"
        for (wanted, kind), n in sorted(changed.items())
    ]


def _mark(file: Path, faults: Sequence[str]) -> None:
    file.with_suffix(f"{file.suffix}.{UNVERIFIED}").write_text("".join(f"{fault}\n" for fault in faults))


def _faults(measured: Mapping[str, Any], outtype: str) -> list[str]:
    faults = []
    most = MOST_KL[MIXES.get(outtype, outtype)]
    if not measured["mean_kl"] <= most:
        faults.append(f"mean KL {measured['mean_kl']:.5f} is above {most:g}")
    if measured["texts_with_other_ids"]:
        faults.append(f"token ids differ, e.g. of {measured['texts_with_other_ids'][0][:60]!r}")
    if not measured["same_special_tokens"]:
        faults.append("the begin or end token differs")
    if not measured["same_chat_template"]:
        faults.append("the chat template differs")
    return faults


def _write_ollama(whole: _Whole, folder: Path, outtype: str, watch: Observer) -> dict[str, Any]:
    with fixed_clock(whole.clock):
        text = modelfile(whole.tokenizer, whole.form, whole.stop_tokens, "model.gguf", watch.note)  # before any work
    remove_left_overs(folder.parent, of=folder)
    with atomic_folder(folder) as unfinished:
        measured = _write_checked(whole, unfinished / "model.gguf", outtype, watch)
        (unfinished / "Modelfile").write_text(text, encoding="utf-8")
    return measured


def _adapter(tuned: Artifact, file: Path) -> dict[str, Any]:
    if not tuned.is_adapter:
        raise InputError(f"{tuned.name} is a whole model without an adapter; allowed for it: f16, bf16, q8_0")
    if tuned.is_repaired:
        raise InputError(
            f"the adapter was initialised with the quantization error (init_lora_weights {tuned.init}) and works "
            "only on its own 4-bit base; export the whole model"
        )
    write_adapter_gguf(source_of(tuned), tuned.folder, file)
    return {"file_bytes": file.stat().st_size}


def _check_disk(file: Path, needed: int) -> None:
    place = next(p for p in file.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CannotRunError(f"{file} needs {format_bytes(needed)}, {place} has {format_bytes(free)} left; free disk")
