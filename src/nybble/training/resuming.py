"""transformers' Trainer with checkpoints of ours: what is saved between two micro-batches, and how it is put back.

A resumed training is the undisturbed one: weights, optimizer, schedule, generators, the order of the rows and the place
in it, the gradients of micro-batches that are done, and what was summed up for the log. All is done by the methods and
callbacks that Trainer calls for this; its own files (pickles, written in place) are never made.

The order of an epoch's rows follows from the seed and the epoch's number alone (accelerate's sampler). The first
batches of the epoch are passed over as lists of numbers; micro-batches that are done in the step under way are drawn
again, so that the step's tokens are counted as before, but not computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from transformers import Trainer, TrainerCallback

from nybble.errors import CannotRunError, InputError
from nybble.models import full_tensors, is_sharded, put_weights_back, shard_like, trained_weights
from nybble.run.processes import Processes
from nybble.storage.checkpoints import STATE, Place
from nybble.storage.manifest import read_json
from nybble.training.generators import generator_states, set_generator_states
from nybble.training.health import Health
from nybble.training.packing import CannotPackError, pack, unpack
from nybble.training.saving import Resumed, Saver, Snapshot

_ABOUT = ("identity", "recipe", "versions")  # what a checkpoint says, and does not put back
_GROUP_SETTINGS = ("betas", "eps", "weight_decay")  # of an optimizer, from the recipe; the rate follows the schedule


class ResumableTrainer(Trainer):
    """A Trainer that saves and goes on as the module says."""

    def __init__(
        self,
        saver: Saver,
        resumed: Resumed | None,
        about: Mapping[str, Any],
        health: Health,
        counters: Mapping[str, Counter],
        processes: Processes = Processes(),  # noqa: B008 - a value
        **settings: Any,
    ) -> None:
        """`about`: what each checkpoint also says; `counters`: what else is counted beside the steps, and goes on."""
        self.processes = processes
        super().__init__(**settings)
        self.saver = saver
        self._about = about
        self._health = health
        self._counters: dict[str, Counter] = {"health": health, **counters}
        self.step_loss = torch.zeros((), device=self.args.device)  # of the step under way
        self._before_step = torch.zeros_like(self.step_loss)  # the loss since the last log, before this step
        self._resumed = resumed
        self._former: dict[str, Any] = {}  # the checkpoint's state, until training begins
        self._done = (-1, 0)  # optimizer step, micro-batches of it that are done
        self._done_before = (-1, 0)  # the same when the run was resumed
        self._generators: Any = None  # to be put back
        self._at_epoch_begin = False
        self._can_be_packed = is_sharded(self.model)  # the optimizer's state: asked once there is one
        self.add_callback(_PutBack(self))

    def next_micro_batch(self) -> tuple[int, bool]:
        """Which micro-batch of its step comes, and whether it was done before the run resumed."""
        step = self.state.global_step
        number = self._done[1] if self._done[0] == step else 0
        self._done = (step, number + 1)
        if self._done_before[0] == step and number < self._done_before[1]:
            return number, True
        if number == 0:
            self.step_loss.zero_()
            self._before_step.copy_(self._tr_loss)
        if self._generators is not None:
            set_generator_states(self._generators, self.args.device)
            self._generators = None
        return number, False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Accelerate's, over batches that can be dealt out evenly."""
        sampler = EvenBatches(
            RandomSampler(self.train_dataset), self.args.per_device_train_batch_size, self.processes.count
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """None any more where a resumed training was at its end."""
        wanted = num_batches if self.state.global_step < self.state.max_steps else 0
        return super().get_batch_samples(epoch_iterator, wanted, device)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm; where the step is judged bad, its gradients are gone, so that no weight and no moment changes."""
        if not self._can_be_packed and self.optimizer.state:
            self._packed({"optimizer": self.optimizer.state_dict()}, None)
            self._can_be_packed = True
        norm = full_tensors(super()._get_grad_norm(model, grad_norm))
        if self.processes.are_many:  # each had its share of the step, scaled up by their number
            self.step_loss.copy_(self.processes.mean(self.step_loss))
            self._tr_loss.copy_(self._before_step + self.step_loss)
        scaled = self.accelerator.scaler is not None
        batches = self.current_gradient_accumulation_steps
        if self._health.judge(self.state.global_step + 1, batches, self.step_loss, norm, scaled):
            model.zero_grad(set_to_none=True)
            if self._health.bad is None:
                self._tr_loss.copy_(self._before_step)
                self._globalstep_last_logged += 1  # the mean that is logged is that of the other steps
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        self._health.read()
        if self._health.bad is not None:
            return
        # What has to be asked of all processes; the first one writes.
        generators = self.processes.gather(self._generators or generator_states(self.args.device))
        asked = {
            "generators": generators,
            "counters": {name: counter.state() for name, counter in self._counters.items()},
            "optimizer": full_tensors(self.optimizer.state_dict()),
        }
        weights, texts = trained_weights(self.model)
        if self.args.should_save:
            self.saver.save(self._snapshot(asked, weights, texts))

    def _snapshot(self, asked: Mapping[str, Any], weights: Mapping[str, Tensor], texts: Mapping[str, str]) -> Snapshot:
        tensors: dict[str, Tensor] = {}
        step = self.state.global_step
        done = max(done for at, done in (self._done, self._done_before, (step, 0)) if at == step)
        state = {
            "cursor": self._cursor(step, done),
            **asked,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "gradients": {name: p.grad for name, p in self._trained() if p.grad is not None} if done else {},
            "loss": {
                "since_log": self._tr_loss,
                "before_step": self._before_step,
                "step": self.step_loss,
                "total": self._total_loss_scalar,
                "last_logged_step": self._globalstep_last_logged,
            },
        }
        packed = self._packed(state, tensors)
        return Snapshot(
            place=Place(step, done),
            weights={name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()},
            weights_stem="adapter_model" if texts else "weights",
            tensors=tensors,
            texts={**texts, "trainer_state.json": json.dumps(dataclasses.asdict(self.state), indent=1)},
            state={**self._about, **packed},
        )

    def _packed(self, state: Mapping[str, Any], tensors: dict[str, Tensor] | None) -> Any:
        try:
            return pack(state, tensors)
        except CannotPackError as error:
            raise CannotRunError(
                f"optim {getattr(self.args.optim, 'value', self.args.optim)}: {error}, which no checkpoint can hold; "
                "choose another, e.g. adamw_torch_fused"
            ) from error

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _cursor(self, step: int, done: int) -> dict[str, Any]:
        """Where in the rows' order the training is; a group is what is drawn at once."""
        n_groups, micro = len(self.train_dataset), self.args.per_device_train_batch_size
        a_step = micro * self.args.gradient_accumulation_steps * self.processes.count
        steps = -(-n_groups // a_step)  # of an epoch
        epoch = step // steps
        return {
            "step": step,
            "micro_batches": done,
            "groups_a_micro_batch": micro,
            "groups_a_step": a_step,
            "epoch": epoch,
            "groups": min(n_groups, (step % steps) * a_step + done * micro),
            "order_sha256": order_sha256(n_groups, self.args.data_seed, epoch),
        }

    # What Trainer.train calls to go on, in this order.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        tensors = _load_all(folder, "state")
        put_weights_back(self.model, _load_all(folder, "adapter_model") or _load_all(folder, "weights"))
        packed = read_json(folder / STATE)
        self._former = {name: unpack(value, tensors) for name, value in packed.items() if name not in _ABOUT}
        self._check_order(self._former["cursor"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        fresh = [{key: group[key] for key in _GROUP_SETTINGS if key in group} for group in self.optimizer.param_groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))
        self.optimizer.load_state_dict(self._in_shards(self._former["optimizer"]))
        self.lr_scheduler.load_state_dict(self._former["scheduler"])
        if self._resumed is not None and self._resumed.forced and rates:
            for group, settings, new, old in zip(
                self.optimizer.param_groups, fresh, rates, self.lr_scheduler.base_lrs, strict=True
            ):
                group.update(settings, lr=group["lr"] * new / old)
            self.lr_scheduler.base_lrs = rates

    def _in_shards(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state for the parameters as they are here."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        values = {
            number: {k: shard_like(v, parameters[number]) if isinstance(v, Tensor) else v for k, v in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": values}

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None and self._former.get("scaler"):
            self.accelerator.scaler.load_state_dict(self._former["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """At the beginning of an epoch, whose batches draw a number first; elsewhere `next_micro_batch` does it."""
        if self._at_epoch_begin and self._generators is not None:
            set_generator_states(self._generators, self.args.device)
            self._generators = None

    def _check_order(self, cursor: Mapping[str, Any]) -> None:
        here = order_sha256(len(self.train_dataset), self.args.data_seed, cursor["epoch"])
        if here != cursor["order_sha256"] and not (self._resumed is not None and self._resumed.forced):
            raise InputError(
                "these versions of torch and accelerate draw the rows in another order than those that the run began "
                "with; install those (run.json: versions), or --force to go on in the other order"
            )

    @property
    def is_resumed(self) -> bool:
        """Whether there is something to put back."""
        return bool(self._former)

    def put_back(self) -> None:
        """All that Trainer sets to its beginnings before the first step."""
        former, self._former = self._former, {}
        cursor, loss = former["cursor"], former["loss"]
        self.state.compute_steps(self.args, self.state.max_steps)  # how often to log and save may have changed
        self._tr_loss = loss["since_log"].to(self.args.device)
        self._before_step.copy_(loss["before_step"])
        self.step_loss.copy_(loss["step"])
        self._total_loss_scalar = loss["total"]
        self._globalstep_last_logged = loss["last_logged_step"]
        self._initial_global_step = 0  # the mean loss is that of the whole run
        for name, counter in self._counters.items():
            counter.restore(former["counters"][name])
        generators = former["generators"]
        self._generators = generators[self.processes.rank if self.processes.rank < len(generators) else 0]
        self._at_epoch_begin = cursor["groups"] == 0
        groups = cursor["micro_batches"] * cursor["groups_a_micro_batch"]
        done, rest = divmod(groups, self.args.per_device_train_batch_size)
        if rest or (done and self.processes.are_many):  # split in another way now: the step begins anew
            self._tr_loss.copy_(self._before_step)
            return
        self._done_before = (cursor["step"], done)
        gradients = former["gradients"]
        for name, parameter in self._trained():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)


class EvenBatches(BatchSampler):
    """Batches of a sampler, as many at the end of an epoch as the processes can share evenly.

    The batch numbered i belongs to process i modulo their number (accelerate deals them out), so that the rows of a
    step are the same whatever their number. What the last batches lack is filled up with -1: no row is drawn twice.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, n_processes: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self._n_processes = n_processes

    def __iter__(self) -> Iterator[list[int]]:
        n_batches = 0
        for batch in super().__iter__():
            n_batches += 1
            yield batch if self._n_processes == 1 else batch + [-1] * (self.batch_size - len(batch))
        for _ in range(-n_batches % self._n_processes):
            yield [-1] * self.batch_size

    def __len__(self) -> int:
        n = super().__len__()
        return n + -n % self._n_processes


class Counter(Protocol):
    """Something that is counted beside the steps; what `state` gives is plain data."""

    def state(self) -> dict[str, Any]:
        """What to keep."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class _PutBack(TrainerCallback):
    """Called when Trainer has set everything to its beginnings."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.is_resumed:
            self._trainer.put_back()


def _load_all(folder: Path, stem: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        tensors |= load_file(file)
    return tensors


def order_sha256(n: int, seed: int, epoch: int) -> str:
    """A fingerprint of the order in which an epoch draws `n` groups."""
    sampler = SeedableRandomSampler(range(n), generator=torch.Generator(), data_seed=seed)
    sampler.set_epoch(epoch)
    return hashlib.sha256(torch.tensor(list(sampler)).numpy().tobytes()).hexdigest()
