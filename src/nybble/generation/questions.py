"""Questions to a run, an adapter or a merged model: what base and tuned model answer, greedily, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nybble.data import encode_prompt
from nybble.errors import InputError, ModelError, RowsError
from nybble.guard import brief
from nybble.hardware import Device, detect_device
from nybble.models import Artifact, add_adapter, find_artifact, find_model, load_artifact, load_model
from nybble.recipe import EvaluationSection
from nybble.training import generate_answers, stop_at

BATCH = 16  # questions at a time


@dataclass(frozen=True)
class Answer:
    """One question and what was answered."""

    prompt: str
    base: str | None  # None where there is no base to compare with
    tuned: str
    others: dict[str, str] = field(default_factory=dict)  # further adapters on the same base, by what the user named


def ask(
    tuned: Path | str,
    questions: Sequence[str],
    device: str | None = None,
    *,
    others: Sequence[Path | str] = (),
    system: str = "",
    max_new_tokens: int = 64,
    trust_remote_code: bool = False,
) -> list[Answer]:
    """What the base and the tuned model answer to `questions`, and further adapters on that base, loaded once.

    Args:
        tuned: folder of a run, of an adapter or of a whole model.
        questions: put as the training rows were.
        device: "auto", "cpu", "cuda" or "hip"; default: as trained.
        others: runs or adapters of the same base.
        system: system text before each question.
        max_new_tokens: length of an answer at most.
        trust_remote_code: run Python code that the model brings along.

    Raises:
        InputError: no question, or nothing of the kind; ModelError: a base is gone, or another one.
    """
    if not questions:
        raise InputError('no question given; e.g. nybble ask RUN "What makes a good chatbot?"')
    on = now(device, trust_remote_code)
    first = find_artifact(str(tuned), on)
    more = [find_artifact(str(other), on) for other in others]
    place = detect_device(first.base.device)
    model, tokenizer, dtype = load_artifact(first, place)
    form = form_of(first, tokenizer)
    prompts = [encode_prompt(question, tokenizer, form, system) for question in questions]
    section = EvaluationSection(max_new_tokens=max_new_tokens, per_device_eval_batch_size=BATCH)
    say = partial(generate_answers, prompts=prompts, section=section, compute_dtype=dtype, tokenizer=tokenizer)
    stop_at(model, first.stop_tokens)
    answers = say(model)
    found: dict[str, list[str]] = {}
    for other, adapter in zip(more, add_adapters(model, first, more), strict=True):
        model.set_adapter(adapter)
        found[other.name] = say(model)
    with base_of(model, first):
        base = say(model) if first.is_adapter and first.init != "pissa" else None
    del model
    if (base is None and first.base != first.original) or first.init == "pissa":
        base = say(_untrained(first, place))
    return [
        Answer(question, base[i] if base else None, answers[i], {name: texts[i] for name, texts in found.items()})
        for i, question in enumerate(questions)
    ]


def now(device: str | None, trust_remote_code: bool) -> dict[str, Any] | None:
    """The settings that are not as they were in training."""
    return ({"device": device} if device else {}) | ({"trust_remote_code": True} if trust_remote_code else {}) or None


def read_questions(file: Path) -> list[str]:
    """Questions of a file: a line each, or in .jsonl an object with `prompt` (or a string) a line.

    Raises:
        RowsError: there is no such file, or a line is of another kind.
    """
    if not file.is_file():
        raise RowsError(f"{file} does not exist; give a text file with a question a line, or a .jsonl file")
    try:
        # Not splitlines(): text inside a line may hold other separators.
        lines = [line.strip() for line in file.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise RowsError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if file.suffix != ".jsonl":
        return [line for line in lines if line]
    found = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowsError(f"{file} line {number}: not JSON ({brief(error)}); repair the line") from error
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise RowsError(
                f"{file} line {number}: no question; allowed are a string and an object with the string 'prompt'"
            )
        found.append(text)
    return found


def form_of(tuned: Artifact, tokenizer: Any) -> str:
    """How its prompts are put; where nobody noted it, by the chat template if there is one."""
    return tuned.form or ("template" if tokenizer.chat_template else "plain")


def add_adapters(model: Any, first: Artifact, others: Sequence[Artifact]) -> list[str]:
    """Put further adapters beside the first, on the base that is loaded; the names to switch to.

    Raises:
        ModelError: one stands on another base.
    """
    names = []
    for number, other in enumerate(others, start=1):
        same = (other.base, other.fingerprint, other.quantization, other.method) == (
            first.base.model_copy(update={"device": other.base.device}),
            first.fingerprint,
            first.quantization,
            first.method,
        )
        if not (first.is_adapter and other.is_adapter and same):
            raise ModelError(
                f"{other.name} is no adapter on the base of {first.name} ({first.base.model_name_or_path}); adapters "
                "share a base that was packed alike: ask this one by itself"
            )
        names.append(f"other-{number}")
        add_adapter(model, other.folder, names[-1])
    return names


def base_of(model: Any, tuned: Artifact) -> AbstractContextManager[Any]:
    """Within: the model without its adapter."""
    without: AbstractContextManager[Any] = model.disable_adapter() if tuned.is_adapter else nullcontext()
    return without


def _untrained(tuned: Artifact, device: Device) -> Any:
    """The model that training began with, where taking the adapter off does not give it: after full training, and
    under pissa, whose base lacks what the adapter started with."""
    source = find_model(tuned.original)
    method = "qlora" if tuned.is_adapter else "lora"
    model, _report = load_model(source, method, tuned.original, tuned.quantization, device)
    stop_at(model, tuned.stop_tokens)
    return model
