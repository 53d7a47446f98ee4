"""What a training continues from: everything that changes from one micro-batch to the next, but for the weights."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nybble.errors import InputError
from nybble.models import full_tensors, shard_like
from nybble.run.processes import Processes
from nybble.training.best import BestStep
from nybble.training.dataloader import StepLoader

NORMS_REMEMBERED = 100
_GROUP_SETTINGS = ("betas", "eps", "weight_decay")  # settings of an optimizer that the recipe decides on resuming


class TrainState:
    """The state of one training; `state_dict` is plain data and tensors, and `load_state_dict` continues from it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        scaler: torch.amp.GradScaler | None,
        loader: StepLoader,
        device: torch.device,
        processes: Processes = Processes(),  # noqa: B008 - a value
        best: BestStep | None = None,
        n_figures: int = 0,
    ) -> None:
        """`n_figures`: what the objective reports of a step beside its loss."""
        self.best = best or BestStep()
        self.optimizer = optimizer
        self.schedule = schedule
        self.scaler = scaler
        self.loader = loader
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._device = device
        self._processes = processes

        self.step = 0  # optimizer steps that are done
        self.micro_batches = 0  # micro-batches of the current step that each process has done
        self.tokens = 0  # tokens that all processes have trained on, without padding
        self.started = time.monotonic()  # as if the training had never been interrupted

        # Sums of losses stay on the device until they are logged, so that no step waits for it.
        self.step_loss = torch.zeros((), device=device)  # the loss of the current step
        self.unlogged_loss = torch.zeros((), device=device)  # since the last log, including the current step
        self.unlogged_before_step = torch.zeros((), device=device)  # the same without the current step
        self.logged_loss = 0.0
        self.unlogged_steps = 0
        # What the objective reports, as the losses: of the current step, since the last log, and without the step.
        self.step_figures = torch.zeros(n_figures, device=device)
        self.unlogged_figures = torch.zeros(n_figures, device=device)
        self.unlogged_figures_before_step = torch.zeros(n_figures, device=device)

        self.gradient_norms: deque[float] = deque(maxlen=NORMS_REMEMBERED)
        self.skipped_steps = 0

    @property
    def seconds(self) -> float:
        """Spent on training so far."""
        return time.monotonic() - self.started

    def begin_step(self) -> None:
        """Before the first micro-batch of a step."""
        if self.step % self.loader.steps_an_epoch == 0:
            # As torch's DataLoader does when an epoch begins: layers that draw from torch's generator draw the same.
            torch.empty((), dtype=torch.int64).random_()
        self.step_loss.zero_()
        self.unlogged_before_step.copy_(self.unlogged_loss)
        self.step_figures.zero_()
        self.unlogged_figures_before_step.copy_(self.unlogged_figures)

    def finish_micro_batch(self, loss: Tensor, figures: Tensor) -> None:
        """After forward and backward of a micro-batch."""
        self.step_loss += loss
        self.unlogged_loss += loss
        self.step_figures += figures
        self.unlogged_figures += figures
        self.micro_batches += 1

    def share_step_loss(self) -> None:
        """Take the mean over the processes, each of which had its share of the step, scaled up by their number."""
        if self._processes.are_many:
            self.step_loss.copy_(self._processes.mean(self.step_loss))
            self.unlogged_loss.copy_(self.unlogged_before_step + self.step_loss)
            if len(self.step_figures):
                self.step_figures.copy_(self._processes.mean(self.step_figures))
                self.unlogged_figures.copy_(self.unlogged_figures_before_step + self.step_figures)

    def finish_step(self, n_tokens: int, *, is_skipped: bool) -> None:
        """After the update; the loss of a skipped step counts for no log."""
        if is_skipped:
            self.unlogged_loss.copy_(self.unlogged_before_step)
            self.unlogged_figures.copy_(self.unlogged_figures_before_step)
            self.skipped_steps += 1
        else:
            self.unlogged_steps += 1
        self.step += 1
        self.micro_batches = 0
        self.tokens += n_tokens

    def take_unlogged_figures(self, names: Sequence[str]) -> dict[str, float]:
        """The means of what the objective reported in the steps since the last log, by name; before the loss's."""
        means = (self.unlogged_figures / self.unlogged_steps).tolist() if names else ()
        self.unlogged_figures.zero_()
        return dict(zip(names, means, strict=True))

    def take_unlogged_loss(self) -> float:
        """The mean loss of the steps since the last log, which begins again; waits for the device."""
        total = float(self.unlogged_loss.item())
        mean = total / self.unlogged_steps
        self.logged_loss += total
        self.unlogged_loss.zero_()
        self.unlogged_steps = 0
        return mean

    @property
    def mean_loss(self) -> float:
        """Over all steps that were not skipped."""
        return (self.logged_loss + float(self.unlogged_loss.item())) / max(self.step - self.skipped_steps, 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a training continues from; all processes ask together."""
        is_within_step = self.micro_batches > 0
        return {
            "cursor": self.loader.cursor(self.step, self.micro_batches),
            "optimizer": full_tensors(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "best": self.best.state_dict(),
            "generators": self._processes.gather(generator_states(self._device)),
            "gradients": {n: p.grad for n, p in self.trained.items() if p.grad is not None} if is_within_step else {},
            "loss": {
                "step": self.step_loss,
                "unlogged": self.unlogged_loss,
                "unlogged_before_step": self.unlogged_before_step,
                "logged": self.logged_loss,
                "unlogged_steps": self.unlogged_steps,
                **({"figures": self._figures()} if len(self.step_figures) else {}),
            },
            "counters": {
                "tokens": self.tokens,
                "seconds": self.seconds,
                "gradient_norms": list(self.gradient_norms),
                "skipped_steps": self.skipped_steps,
            },
        }

    def _figures(self) -> dict[str, Tensor]:
        return {
            "step": self.step_figures,
            "unlogged": self.unlogged_figures,
            "unlogged_before_step": self.unlogged_figures_before_step,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, is_forced: bool = False) -> None:
        """Continue from what `state_dict` gave.

        Args:
            state: of another training, whose batches may have been split in another way.
            is_forced: settings may have changed, and those of this training count.

        Raises:
            InputError: this machine draws the rows in another order, and `is_forced` is not given.
        """
        cursor, loss, counters = state["cursor"], state["loss"], state["counters"]
        if self.loader.order_sha256(cursor["epoch"]) != cursor["order_sha256"] and not is_forced:
            raise InputError(
                "this version of torch draws the rows in another order than the one that the run began with; install "
                "that version (run.json: versions), or give --force to continue in the other order"
            )
        self._load_optimizer(state, is_forced)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if "best" in state:  # older checkpoints lack it
            self.best.load_state_dict(state["best"])
        self.step = cursor["step"]
        self.tokens, self.skipped_steps = counters["tokens"], counters["skipped_steps"]
        self.started = time.monotonic() - counters["seconds"]
        self.gradient_norms.clear()
        self.gradient_norms.extend(counters["gradient_norms"])
        self.unlogged_before_step.copy_(loss["unlogged_before_step"])
        self.logged_loss, self.unlogged_steps = loss["logged"], loss["unlogged_steps"]
        generators, rank = state["generators"], self._processes.rank
        set_generator_states(generators[rank if rank < len(generators) else 0], self._device)

        figures = loss.get("figures")
        if figures is not None:
            self.unlogged_figures_before_step.copy_(figures["unlogged_before_step"])
            self.unlogged_figures.copy_(figures["unlogged_before_step"])
        groups = cursor["micro_batches"] * cursor["groups_a_micro_batch"]
        done, rest = divmod(groups, self.loader.groups_a_micro_batch)
        if rest or (done and self._processes.are_many):  # the step is split in another way than before and starts over
            self.unlogged_loss.copy_(loss["unlogged_before_step"])
            return
        self.micro_batches = done
        self.unlogged_loss.copy_(loss["unlogged"])
        self.step_loss.copy_(loss["step"])
        if figures is not None:
            self.step_figures.copy_(figures["step"])
            self.unlogged_figures.copy_(figures["unlogged"])
        for name, gradient in state["gradients"].items():
            self.trained[name].grad = gradient.to(self.trained[name].device)

    def _load_optimizer(self, state: Mapping[str, Any], is_forced: bool) -> None:
        groups, schedule = self.optimizer.param_groups, self.schedule
        settings = [{key: group[key] for key in _GROUP_SETTINGS if key in group} for group in groups]
        rates = list(getattr(schedule, "base_lrs", []))
        parameters = [parameter for group in groups for parameter in group["params"]]
        former = state["optimizer"]
        values = {
            number: {k: shard_like(v, parameters[number]) if isinstance(v, Tensor) else v for k, v in entry.items()}
            for number, entry in former["state"].items()
        }
        self.optimizer.load_state_dict({**former, "state": values})
        schedule.load_state_dict(state["schedule"])
        if is_forced and rates:
            changed = zip(self.optimizer.param_groups, settings, rates, schedule.base_lrs, strict=True)
            for group, own_settings, rate, former_rate in changed:
                group.update(own_settings, lr=group["lr"] * rate / former_rate)
            schedule.base_lrs = rates


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's, torch's and the device's random generators.

    The dropout of our adapters draws from none of them: its seeds are a function of the micro-step
    (`nybble.nn.dropout_seed`).
    """
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `generator_states` gave; a device's state that was saved on another kind of device is left out."""
    random.setstate(states["python"])
    name, key, *rest = states["numpy"]
    np.random.set_state((name, key.numpy(), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "device" in states:
        torch.cuda.set_rng_state(states["device"], device)
