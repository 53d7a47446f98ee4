"""One training step, traced: the code that trains, with its memory counted, on fake tensors or on real ones.

    run_steps        forward, backward, clipping, optimizer; twice, since the first makes the optimizer's state
    run_evaluation   one evaluated batch

Tensors are on the CPU, whatever the device that is planned for: shapes and types are the same. A step falls into
sections; the highest moment of each is kept. Sections are named for what they compute and for the layer that they lie
in, by its place among those that are traced: `backward 0`. The moment before a layer, `gather 0`, and before the head
is a section too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.data import FlatBatch, PadBatch
from nybble.data.batches import Group
from nybble.models import MemorySavers, blocks_of, decoder_layers, recomputable_layers, recompute_by, set_recomputed
from nybble.models.lora_linear import share_seeds
from nybble.nn.dropout_seed import DropoutSeeds
from nybble.nn.recompute import recomputed, recomputing
from nybble.nn.workspace import workspace
from nybble.planning.memory_tracer import HOST, MemoryTracer, Peak
from nybble.training.answers import sums_by_answer, token_log_probabilities, with_answers
from nybble.training.objective import next_token_loss


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch, on which memory depends, without its tokens."""

    lengths: tuple[int, ...]  # tokens of each row
    learned: int | None = None  # tokens that are learned; None: all that can be
    # Of each row, if some are trees or packs: how many rows a padded batch has for it, and the tokens of the longest.
    unfolded: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return sum(self.lengths)

    @property
    def padded(self) -> tuple[int, ...]:
        """Tokens of each row of a padded batch."""
        return tuple(longest for n, longest in self.unfolded for _ in range(n)) or self.lengths

    def first(self, n: int, learned: int | None) -> BatchShape:
        """The first `n` rows, of which no more than `learned` tokens are learned; None: as many as can be."""
        lengths = self.lengths[:n]
        return BatchShape(lengths, None if learned is None else min(learned, sum(lengths)), self.unfolded[:n])

    def groups(self, unfolds: bool = False) -> list[Group]:
        """Rows of this shape as a collator takes them, one in each group; learned tokens stand at a row's end.

        `unfolds`: each path of a tree is a row.
        """
        left = self.tokens if self.learned is None else self.learned
        made: list[Group] = []
        for length in self.padded if unfolds else self.lengths:
            n = min(left, length)
            left -= n
            made.append([{"input_ids": [0] * length, "labels": [-100] * (length - n) + [0] * n}])
        return made


@dataclass(frozen=True)
class StepCost:
    """What a step or an evaluated batch took."""

    peaks: dict[str, Peak]  # of each section
    flops: int
    moved_bytes: int
    operators: int  # calls that do work: each costs the host some time
    rest: dict[str, int]  # bytes alive afterwards, by part
    host_bytes: int = 0  # waiting on the host, at their highest

    @property
    def peak(self) -> Peak:
        """The highest peak of all sections."""
        return max(self.peaks.values(), key=lambda peak: peak.total_bytes)


def adopt(live: MemoryTracer, model: Any, savers: MemorySavers | None = None) -> None:
    """Count the tensors of `model` as weights or adapters, and those that are on the host as host memory."""
    live.adopt([*model.parameters(), *model.buffers()], "weights")
    # A tied or packed tensor counts once; adapters are what PEFT added.
    live.adopt([p for name, p in model.named_parameters() if _is_adapter(name)], "adapters")
    live.adopt(savers.on_host if savers else (), HOST)


def _is_adapter(name: str) -> bool:
    """Whether PEFT added the parameter of this name."""
    return any(part in name for part in ("lora_", "trainable_tokens", "modules_to_save"))


def batch_of(model: Any, rows: BatchShape, *, by_answer: bool = False) -> dict[str, Any]:
    """The batch that the collator makes of `rows`, in real tensors; it must not be called under a fake mode.

    `by_answer`: as a preference objective takes it, which weighs answers.
    """
    blocks = blocks_of(model)
    if not blocks.flattened:
        batch: dict[str, Any] = PadBatch(0)(rows.groups(unfolds=True))
    else:
        batch = FlatBatch()(rows.groups(unfolds=not blocks.trees))
    return with_answers(batch) if by_answer else batch


def _loss_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """A loss that takes what the objective's takes: of learned tokens, or of the log-probabilities of answers."""
    if "answer_lengths" not in inputs:
        return next_token_loss(model, inputs, torch.ones(()))
    return -sums_by_answer(token_log_probabilities(model, inputs), inputs).sum()


def _like(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of the same shapes, in the fake mode that is active now."""
    return {k: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for k, v in batch.items()}


def run_steps(
    live: MemoryTracer,
    model: Any,
    batch: dict[str, Any],
    n_recomputed: int,
    dtype: torch.dtype,
    n_steps: int = 2,
    savers: MemorySavers | None = None,
) -> list[StepCost]:
    """Run `n_steps` steps over `batch`, and return what each of them took.

    The first of two steps makes the optimizer's state and the reused memory. A single step stands for a later one: the
    state is made beforehand, and `workspace` should hold what earlier steps left there. `savers` are the model's memory
    savers, already applied; they decide how a layer is recomputed.
    """
    share_seeds(model, DropoutSeeds(0, 0))
    model.train()
    layers = recomputable_layers(model)
    set_recomputed(layers, n_recomputed)
    if savers is None or not savers.available:
        recompute_by(layers, recomputed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    done = []
    with live, _sections(live, model), _gradients(live, trained):
        if n_steps == 1:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            _update(live, optimizer, trained)
        for _ in range(n_steps):
            live.start("forward")
            inputs = _like(batch)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = _loss_of(model, inputs)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            live.section("update")
            _update(live, optimizer, trained)
            del inputs
            done.append(
                StepCost(live.peaks, live.flops, live.moved_bytes, live.operators, live.parts(), live.host_peak_bytes)
            )
    return done


def stepper(model: Any, batch: dict[str, Any], dtype: torch.dtype, n_recomputed: int = 0) -> Callable[[], None]:
    """A function that runs a step over `batch` on real tensors, to be timed; nothing is counted."""
    share_seeds(model, DropoutSeeds(0, 0))
    model.train()
    layers = recomputable_layers(model)
    set_recomputed(layers, n_recomputed)
    recompute_by(layers, recomputed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = next_token_loss(model, batch, torch.ones(()))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _update(live: MemoryTracer, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    with live.part("workspace"):
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
    with live.part("optimizer"):
        optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _gradients(live: MemoryTracer, trained: list[nn.Parameter]) -> Iterator[None]:
    """Count each gradient as one as soon as it has been accumulated."""

    def made(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.adopt([parameter.grad], "gradients")

    handles = [p.register_post_accumulate_grad_hook(made) for p in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_evaluation(live: MemoryTracer, model: Any, batch: dict[str, Any], dtype: torch.dtype) -> StepCost:
    """Evaluate one batch, and return what that took."""
    model.eval()
    with live, torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        live.start("evaluate")
        inputs = _like(batch)
        if "answer_lengths" in inputs:
            sums_by_answer(token_log_probabilities(model, inputs), inputs)
        else:
            model(**inputs)
    return StepCost(live.peaks, live.flops, live.moved_bytes, live.operators, live.parts())


@contextmanager
def _sections(live: MemoryTracer, model: Any) -> Iterator[None]:
    """Report to `live` which layer is at work, in the forward and in the backward pass."""
    handles, layers, head = [], decoder_layers(model), model.get_output_embeddings()
    if head is not None:
        handles.append(head.register_forward_pre_hook(_enters(live, "gather head", "loss")))
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(_enters(live, f"gather {number}", f"forward {number}")))
        handles.append(layer.register_forward_hook(_leaves(live, number, number == len(layers) - 1)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enters(live: MemoryTracer, moment: str, section: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any) -> None:
        if not recomputing():
            live.section(moment)
            live.section(section)

    return hook


def _leaves(live: MemoryTracer, number: int, is_last: bool) -> Callable[..., None]:
    """After the last layer comes the loss; a layer's backward pass begins when its output's gradient arrives."""

    def turned(_grad: Tensor) -> None:
        live.section(f"backward {number}")
        live.making = "activations"

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if recomputing():
            return
        if is_last:
            live.section("loss")
            live.making = "loss"
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(turned)  # type: ignore[no-untyped-call]

    return hook


Reused = tuple[tuple[int, torch.dtype], ...]  # elements and type of each piece of reused memory


def reused() -> Reused:
    """The pieces that `workspace` holds now."""
    return tuple((piece.numel(), piece.dtype) for piece in workspace.pieces())


@contextmanager
def reusing(pieces: Reused = ()) -> Iterator[None]:
    """Within, reused memory starts with `pieces`; afterwards it is empty."""
    workspace.clear()
    for n, dtype in pieces:
        workspace.take((n,), torch.empty(0), dtype)
    try:
        yield
    finally:
        workspace.clear()
        workspace.keep(True)
