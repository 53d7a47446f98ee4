"""Held-out figures: loss a learned token, and exact match where rows carry an answer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nybble.data import IGNORED, Example, FlatBatch, Groups, PadBatch
from nybble.models import blocks_of
from nybble.recipe import EvaluationSection
from nybble.runs import Evaluation


@contextmanager
def evaluation_mode(model: Any, compute_dtype: torch.dtype) -> Iterator[None]:
    """No gradients, no dropout, the arithmetic of the training step; the training mode is put back afterwards."""
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: Any, tokenizer: Any, examples: Sequence[Example], section: EvaluationSection, compute_dtype: torch.dtype
) -> Evaluation | None:
    """Loss over all learned tokens of `examples`, each token weighing the same; exact match where rows allow.

    None where there are no examples.
    """
    if not examples:
        return None
    started = time.monotonic()
    collate = batches_for(model, tokenizer)
    with evaluation_mode(model, compute_dtype):
        total, n_tokens = _summed_loss(model, examples, section.per_device_eval_batch_size, collate)
        checkable = [example for example in examples if example.answer is not None and example.prompt_ids]
        answers = _generate(model, tokenizer, [e.prompt_ids for e in checkable], section) if checkable else []
    right = [a == (e.answer or "").strip() for a, e in zip(answers, checkable, strict=True)]
    loss = total / n_tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        n_rows=len(examples),
        n_tokens=n_tokens,
        exact_match=sum(right) / len(right) if right else None,
        seconds=time.monotonic() - started,
    )


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], section: EvaluationSection, compute_dtype: torch.dtype
) -> list[str]:
    """Greedy answers to prompts given as token ids, without special tokens and surrounding space."""
    with evaluation_mode(model, compute_dtype):
        return _generate(model, tokenizer, prompts, section)


def stop_at(model: Any, tokens: Sequence[int]) -> None:
    """Let generation stop at `tokens` too: what ends a turn in the rows need not be the model's own end token.

    It is part of the model's generation config, so a model that is saved whole stops there as well.
    """
    config = model.generation_config
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({*tokens, *own} - {None})


def batches_for(model: Any, tokenizer: Any) -> FlatBatch | PadBatch:
    """How rows become a batch of `model`."""
    return FlatBatch() if blocks_of(model).flattened else PadBatch(tokenizer.pad_token_id)


def _summed_loss(
    model: Any, examples: Sequence[Example], batch_size: int, collate: FlatBatch | PadBatch
) -> tuple[float, int]:
    device = next(model.parameters()).device
    # Rows of like length share a batch: the sum does not depend on it, the padding does.
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    total, n_tokens = 0.0, 0
    for first in range(0, len(ordered), batch_size):
        batch = collate(Groups(ordered[first : first + batch_size]))
        n = int((batch["labels"][:, 1:] != IGNORED).sum())
        if n:
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            loss = model(**moved).loss
            total += float(loss) * n
            n_tokens += n
    return total, n_tokens


def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], section: EvaluationSection) -> list[str]:
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    configured = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    for first in range(0, len(order), section.per_device_eval_batch_size):
        chosen = order[first : first + section.per_device_eval_batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        # Padding goes to the left, so that every answer starts right behind its prompt.
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i], device=device)
            mask[row, longest - len(prompts[i]) :] = 1
        produced = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=section.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(stops),
        )
        texts = tokenizer.batch_decode(produced[:, longest:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
    return answers
