"""Answers from a run, base and tuned side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.data import encode_prompt
from nybble.errors import InputError, ModelError
from nybble.hardware import Device
from nybble.models import compute_dtype, find_model, load_adapter, load_model, load_tokenizer
from nybble.recipe import EvaluationSection, ModelSection, Recipe
from nybble.runs import RunDirectory, Sample
from nybble.training import generate_answers, stop_at


@dataclass(frozen=True)
class Asked:
    """Questions, put and ended as the training rows were."""

    questions: Sequence[str]
    form: str  # see `nybble.data.prompt_form`
    stop_tokens: Sequence[int]


def answer(run: RunDirectory, recipe: Recipe, asked: Asked, device: Device) -> list[Sample]:
    """What the base and the tuned model of a finished run answer, greedily.

    Raises:
        InputError: the run has produced no adapter or model yet.
        ModelError: its base is gone or does not fit.
    """
    dtype, _notes = compute_dtype(recipe.quantization.bnb_4bit_compute_dtype, device)
    base_section = _base(run, recipe)
    source = find_model(base_section)
    tokenizer = _tokenizer(run, source, recipe)
    prompts = [encode_prompt(question, tokenizer, asked.form) for question in asked.questions]
    section: EvaluationSection = recipe.evaluation
    model, _report = load_model(source, recipe.method, base_section, recipe.quantization, device)
    untrained = _untrained(model, recipe, device)
    stop_at(untrained, asked.stop_tokens)
    base = generate_answers(untrained, tokenizer, prompts, section, dtype)
    if recipe.method == "full":
        tuned_source = find_model(recipe.model.model_copy(update={"model_name_or_path": str(run.full_model)}))
        tuned_model, _report = load_model(tuned_source, "lora", recipe.model, recipe.quantization, device)
    else:
        tuned_model = load_adapter(model, run.adapter)
    stop_at(tuned_model, asked.stop_tokens)
    tuned = generate_answers(tuned_model, tokenizer, prompts, section, dtype)
    return [Sample(q, b, t) for q, b, t in zip(asked.questions, base, tuned, strict=True)]


def _base(run: RunDirectory, recipe: Recipe) -> ModelSection:
    """The base that the adapter was trained on: the run's own where it has one."""
    if run.base.is_dir():
        return recipe.model.model_copy(update={"model_name_or_path": str(run.base)})
    return recipe.model


def _untrained(model: Any, recipe: Recipe, device: Device) -> Any:
    """The model that answers as the base: under pissa the run's own base lacks what the adapter started with."""
    if recipe.lora.init_lora_weights != "pissa":
        return model
    return load_model(find_model(recipe.model), "qlora", recipe.model, recipe.quantization, device)[0]


def _tokenizer(run: RunDirectory, source: Any, recipe: Recipe) -> Any:
    """The run's own copy: it carries the chat template that was trained with."""
    folder: Path = run.full_model if recipe.method == "full" else run.adapter
    if not folder.is_dir():
        raise InputError(f"{run.path} holds no trained weights yet ({folder.name}/); wait for the run, or --resume it")
    try:
        return load_tokenizer(source, recipe.model.model_copy(update={"tokenizer_name_or_path": str(folder)}))
    except ModelError:
        return load_tokenizer(source, recipe.model)
