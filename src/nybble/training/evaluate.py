"""Evaluation on held-out rows: the loss per learned token, and exact match where rows carry an answer.

Several processes share the batches that one process would make, so the figures do not depend on their number. Each
process computes equally many batches, because sharded weights are gathered by all of them at once: a process that has
none left repeats the last one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nybble.data import IGNORED, Example, FlatBatch, Groups, PadBatch
from nybble.data.tree import paths
from nybble.errors import RecipeError
from nybble.models import blocks_of, is_sharded
from nybble.recipe import EvaluationSection
from nybble.run.processes import Processes
from nybble.run.record import Evaluation, RowLoss, Sample
from nybble.training.held_out_preferences import HeldOutPreferences, answer_sizes


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of a run, and those of them whose answers are shown beside the base's."""

    rows: Sequence[Example]
    section: EvaluationSection  # its batch size is what fits
    shown: Sequence[Example] = ()
    base_answers: Sequence[str] = ()  # the base's answers to the rows that are shown
    preferences: HeldOutPreferences | None = None  # what is measured of pairs and rated answers


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; by default each token is the likeliest one.

    Raises:
        RecipeError: a number that cannot be meant.
    """

    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # tokens are drawn from the likeliest that have this probability together
    seed: int | None = None  # None: other answers each time

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RecipeError(f"temperature: got {self.temperature}; allowed is 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p: got {self.top_p}; allowed is a number above 0, up to 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed: got {self.seed}; allowed is a number from 0 to {2**63 - 1:,}")
        if self.temperature == 0 and (self.top_p < 1 or self.seed is not None):
            raise RecipeError("top_p and seed are for answers that are drawn; give --temperature as well, as 0.7")

    @property
    def arguments(self) -> dict[str, Any]:
        """What `generate` of transformers is given."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}

    @contextmanager
    def drawn(self, device: torch.device, turn: int = 0) -> Iterator[None]:
        """Within, torch draws from the seed, if there is one, and from another for each turn of a conversation."""
        if self.seed is None:
            yield
            return
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices):
            torch.manual_seed((self.seed + turn) % 2**63)
            yield


GREEDY = Sampling()


def device_of(model: Any) -> torch.device:
    """The device where a model computes; its first parameter, the embedding table, may be on the host."""
    *_, last = model.parameters()
    device: torch.device = last.device
    return device


@contextmanager
def evaluation_mode(model: Any, compute_dtype: torch.dtype) -> Iterator[None]:
    """Turn off gradients and dropout and compute as a training step does; restore the training mode afterwards."""
    was_training = model.training
    device = device_of(model)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    section: EvaluationSection,
    compute_dtype: torch.dtype,
    processes: Processes = Processes(),  # noqa: B008 - a value
    preferences: HeldOutPreferences | None = None,
) -> Evaluation | None:
    """Loss over all learned tokens of `examples`, each token weighing the same; exact match where rows allow.

    Of pairs only chosen answers count in the loss, of rated answers only good ones, if there are any.
    None if there are no examples. Every process must call it, and each receives the whole result.
    """
    if not examples:
        return None
    started = time.monotonic()
    collate = batches_for(model, tokenizer)
    with evaluation_mode(model, compute_dtype):
        batches = _alike([len(e.input_ids) for e in examples], section.per_device_eval_batch_size)
        answered = _answer_losses(model, examples, batches, collate, processes)
        checkable = [i for i, e in enumerate(examples) if e.answer is not None and e.prompt_ids]
        prompts = [examples[i].prompt_ids for i in checkable]
        answers = _generate(model, tokenizer, prompts, section, processes) if checkable else []
    right = {i: a == (examples[i].answer or "").strip() for i, a in zip(checkable, answers, strict=True)}
    counted = [i for i, e in enumerate(examples) if e.is_desirable is not False] or range(len(examples))
    sizes = {i: answer_sizes(examples[i])[0] for i in counted}
    loss = math.fsum(answered[i][0] for i in counted) / sum(sizes.values())
    found = tuple(tuple(-nats for nats in row) for row in answered)
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        n_rows=len(counted),
        n_tokens=sum(sizes.values()),
        exact_match=sum(right.values()) / len(right) if right else None,
        seconds=time.monotonic() - started,
        preferences=preferences.figures(examples, found) if preferences else None,
        rows=tuple(RowLoss(examples[i].row, sizes[i], answered[i][0], right.get(i)) for i in counted),
        answers=found if preferences else (),
    )


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    section: EvaluationSection,
    compute_dtype: torch.dtype,
    processes: Processes = Processes(),  # noqa: B008 - a value
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Answers to prompts given as token ids, without special tokens and surrounding space.

    Every process must call it, and each receives all answers.
    """
    with evaluation_mode(model, compute_dtype), sampling.drawn(device_of(model)):
        return _generate(model, tokenizer, prompts, section, processes, sampling)


def sample_answers(
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    compute_dtype: torch.dtype,
    processes: Processes = Processes(),  # noqa: B008 - a value
    *,
    step: int | None = None,
) -> list[Sample]:
    """The rows that are shown, each with the answers of the base and of `model` after `step`."""
    prompts = [example.prompt_ids for example in held_out.shown]
    tuned = generate_answers(model, tokenizer, prompts, held_out.section, compute_dtype, processes)
    return [
        Sample(tokenizer.decode(e.prompt_ids, skip_special_tokens=True), before, after, e.answer, step)
        for e, before, after in zip(held_out.shown, held_out.base_answers, tuned, strict=True)
    ]


def evaluate_quickly(
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    compute_dtype: torch.dtype,
    processes: Processes = Processes(),  # noqa: B008 - a value
) -> Evaluation | None:
    """Evaluate the held-out rows; answers, which take longer, are only generated if they decide which step is best."""
    rows = held_out.rows
    if held_out.section.metric_for_best_model != "eval_exact_match":
        rows = [replace(example, answer=None) for example in rows]
    return evaluate(model, tokenizer, rows, held_out.section, compute_dtype, processes, held_out.preferences)


def stop_at(model: Any, tokens: Sequence[int]) -> None:
    """Let generation also stop at `tokens`: the token that ends a turn in the rows may differ from the model's own.

    They become part of the model's generation config, so a model that is saved whole stops there as well.
    """
    config = model.generation_config
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({*tokens, *own} - {None})


def batches_for(model: Any, tokenizer: Any) -> FlatBatch | PadBatch:
    """The function that makes a batch of rows for `model`: without padding where its blocks allow it."""
    blocks = blocks_of(model)
    return FlatBatch(blocks.trees) if blocks.flattened else PadBatch(tokenizer.pad_token_id)


def _alike(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The numbers of the rows in batches of similar length, which need little padding; no result depends on it."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _share(batches: Sequence[list[int]], processes: Processes) -> Iterator[list[int]]:
    for first in range(0, len(batches), processes.count):
        yield batches[min(first + processes.rank, len(batches) - 1)]


def _answer_losses(
    model: Any,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    collate: FlatBatch | PadBatch,
    processes: Processes,
) -> list[list[float]]:
    """The summed loss of each answer of each example, in nats; what is learned of a plain row is one answer."""
    device = device_of(model)
    mine: dict[int, list[float]] = {}
    for chosen in _share(batches, processes):
        batch = collate(Groups([examples[i] for i in chosen]))
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        totals = _by_example(model, moved, [examples[i] for i in chosen])
        mine |= zip(chosen, totals, strict=True)
    return _in_order(processes.gather(mine))


def _in_order(parts: Sequence[dict[int, Any]]) -> list[Any]:
    found = {i: value for part in parts for i, value in part.items()}
    return [found[i] for i in range(len(found))]


def _by_example(model: Any, batch: dict[str, Any], examples: Sequence[Example]) -> list[list[float]]:
    if "lengths" in batch:
        sizes = [answer_sizes(e) for e in examples]
        sums = [part.sum() for part in model(**batch).token_losses.double().split([n for own in sizes for n in own])]
        each = iter(torch.stack(sums).tolist())
        return [list(islice(each, len(own))) for own in sizes]
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    # One row after the other: the float32 logits of a whole batch would be the peak of the run.
    losses = (
        float(cross_entropy(x.float(), y, ignore_index=IGNORED, reduction="sum"))
        for x, y in zip(logits, labels, strict=True)
    )
    # The paths of a tree are its rows.
    found = [list(islice(losses, len(paths(e.segments)) or 1)) for e in examples]
    return [own if e.is_pair else [sum(own)] for e, own in zip(examples, found, strict=True)]


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    section: EvaluationSection,
    processes: Processes,
    sampling: Sampling = GREEDY,
) -> list[str]:
    device = device_of(model)
    mine: dict[int, str] = {}
    configured = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    for chosen in _share(_alike([len(p) for p in prompts], section.per_device_eval_batch_size), processes):
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
            **sampling.arguments,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(stops),
            synced_gpus=processes.are_many and is_sharded(model),  # who is done helps the others to gather
        )
        texts = tokenizer.batch_decode(produced[:, longest:], skip_special_tokens=True)
        mine |= zip(chosen, (text.strip() for text in texts), strict=True)
    return _in_order(processes.gather(mine))
