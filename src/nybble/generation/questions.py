"""Ask a run, an adapter or a merged model questions and get the greedy answers of base and tuned side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nybble.data import encode_prompt, fixed_clock
from nybble.errors import InputError, ModelError, RecipeError, RowsError
from nybble.guard import brief
from nybble.hardware import Device, detect_device
from nybble.models import Artifact, add_adapter, find_artifact, find_model, load_artifact, load_model
from nybble.recipe import EvaluationSection, path_of
from nybble.run.quiet import quiet_libraries
from nybble.training import Sampling, generate_answers, stop_at

BATCH = 16  # questions that are answered together


@dataclass(frozen=True)
class Answer:
    """One question and its answers."""

    prompt: str
    base: str | None  # None if there is no base to compare with
    tuned: str
    others: dict[str, str] = field(default_factory=dict)  # further adapter, as the user named it -> its answer


@quiet_libraries()
def ask(
    tuned: Path | str,
    questions: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    others: Sequence[Path | str] = (),
    system: str = "",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[Answer]:
    """Answer `questions` with the base, the tuned model, and further adapters of that base, which is loaded once.

    Args:
        tuned: folder of a run, of an adapter or of a whole model.
        questions: the questions; each gets the prompt form of the training rows.
        overrides: settings of the model that have changed since the training, such as the device or the place of the
            base, which adapters of other tools may not name.
        others: runs or adapters of the same base.
        system: system text before each question.
        max_new_tokens: limit for the length of an answer, in tokens.
        temperature: sampling temperature; 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens that have this probability together.
        seed: gives the same answers each time; base, tuned and other adapters all draw from it.

    Raises:
        InputError: there is no question, a number is out of range, or a folder is neither a run, an adapter nor a
            model.
        ModelError: a base is missing, or is not the one that was trained on.
    """
    if not questions:
        raise InputError('no question given; e.g. nybble ask RUN "What makes a good chatbot?"')
    sampling = Sampling(temperature, top_p, seed)
    check_model_settings(overrides)
    first = find_artifact(str(tuned), overrides)
    more = [find_artifact(str(other), overrides) for other in others]
    detected = detect_device(first.base.device)
    model, tokenizer, dtype = load_artifact(first, detected)
    form = form_of(first, tokenizer)
    with fixed_clock(first.clock):
        prompts = [encode_prompt(question, tokenizer, form, system) for question in questions]
    section = EvaluationSection(max_new_tokens=max_new_tokens, per_device_eval_batch_size=BATCH)
    generate = partial(
        generate_answers,
        prompts=prompts,
        section=section,
        compute_dtype=dtype,
        tokenizer=tokenizer,
        sampling=sampling,
    )
    stop_at(model, first.stop_tokens)
    answers = generate(model)
    other_answers: dict[str, list[str]] = {}
    for other, adapter in zip(more, add_adapters(model, first, more), strict=True):
        model.set_adapter(adapter)
        other_answers[other.name] = generate(model)
    with without_adapter(model, first):
        base = generate(model) if first.is_adapter and first.init != "pissa" else None
    del model
    if (base is None and first.base != first.original) or first.init == "pissa":
        base = generate(_untrained(first, detected))
    return [
        Answer(
            prompt=question,
            base=base[i] if base else None,
            tuned=answers[i],
            others={name: texts[i] for name, texts in other_answers.items()},
        )
        for i, question in enumerate(questions)
    ]


def check_model_settings(overrides: Mapping[str, Any] | None) -> None:
    """Check that only settings of the model are given.

    Raises:
        RecipeError: another one is.
    """
    for name in overrides or ():
        if not path_of(name).startswith("model."):
            raise RecipeError(
                f"{name} changes nothing of a finished training; allowed are settings of the model, such as "
                "--model_name_or_path and --device"
            )


def read_questions(file: Path) -> list[str]:
    """The questions in a file: one per line, or in .jsonl one object with `prompt`, or one string, per line.

    Raises:
        RowsError: the file does not exist, is not UTF-8, or has a line without a question.
    """
    if not file.is_file():
        raise RowsError(f"{file} does not exist; give a text file with one question per line, or a .jsonl file")
    try:
        # splitlines() would also split at other separators, which text inside a line may contain.
        lines = [line.strip() for line in file.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise RowsError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if file.suffix != ".jsonl":
        return [line for line in lines if line]
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowsError(f"{file} line {number}: is not valid JSON ({brief(error)}); repair the line") from error
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise RowsError(
                f"{file} line {number}: has no question; allowed are a string, or an object with the string 'prompt'"
            )
        questions.append(text)
    return questions


def form_of(tuned: Artifact, tokenizer: Any) -> str:
    """The prompt form of the training rows; if it is unknown, the chat template, or plain text if there is none."""
    return tuned.form or ("template" if tokenizer.chat_template else "plain")


def add_adapters(model: Any, first: Artifact, others: Sequence[Artifact]) -> list[str]:
    """Load further adapters onto the base that is in memory; returns the names that PEFT switches to.

    Raises:
        ModelError: an adapter belongs to another base.
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
                f"{other.name} is not an adapter of the same base as {first.name} ({first.base.model_name_or_path}), "
                "packed in the same way; ask this one separately"
            )
        names.append(f"other-{number}")
        add_adapter(model, other.folder, names[-1])
    return names


def without_adapter(model: Any, tuned: Artifact) -> AbstractContextManager[Any]:
    """A context in which the model computes without its adapter."""
    disabled: AbstractContextManager[Any] = model.disable_adapter() if tuned.is_adapter else nullcontext()
    return disabled


def _untrained(tuned: Artifact, device: Device) -> Any:
    """The model before training, for cases where disabling the adapter does not restore it: after full training, and
    with pissa, whose base lacks what the adapter started with."""
    source = find_model(tuned.original)
    method = "qlora" if tuned.is_adapter else "lora"
    model, _report = load_model(source, method, tuned.original, tuned.quantization, device)
    stop_at(model, tuned.stop_tokens)
    return model
