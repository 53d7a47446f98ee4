"""What several processes take and send: each with the whole model (ddp), or with a shard of every weight (fsdp).

    sent under ddp    2 (N-1)/N x gradients, once a step (ring all-reduce)
    sent under fsdp   (N-1)/N x weights and adapters, for forward and backward of each micro-batch (all-gather; tables
                      that are units of their own for forward only), (N-1)/N x gradients after it (reduce-scatter)
    in groups of N    the same, and 2 (M-1)/M x gradients/N over M groups after each micro-batch (all-reduce)

Where shards wait on the host (`fsdp_cpu_offload`), a device holds none of them, only what is gathered; they and their
gradients cross the link to the host, 1/N of them each time that everything is gathered.

Traffic overlaps with computing, so a step takes the longer of the two. The rate of the links is that of the kind of
device within one machine, unless a rate is given; so times are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nybble.errors import InputError
from nybble.hardware import Device, detect_device
from nybble.models import compute_dtype, shards_among
from nybble.planning.devices import Links, Profile, named_profile, profile_of
from nybble.planning.phases import Batches
from nybble.planning.planner import find_config, make_plan, read_batches
from nybble.planning.sharded_memory import Sizes
from nybble.recipe import (
    Plan,
    Recipe,
    RecipeSource,
    for_one_process,
    in_micro_batches,
    load_recipe,
    rows_per_step,
    step_in_words,
)
from nybble.run.quiet import quiet_libraries
from nybble.units import UnlikelySizeError, format_bytes, format_seconds, parse_bytes

_HOST_LINK = 25e9  # bytes a second between host and device: PCIe 4.0 x16, less what its protocol takes; assumed


@dataclass(frozen=True)
class SharedPlan:
    """The plan of each of several processes, and what a step costs them."""

    processes: int
    distributed: str  # ddp or fsdp
    plan: Plan  # of one process
    sent_bytes_per_step: int  # and received, by each
    link_bytes_per_second: float  # that each sends
    step_seconds: float | None
    alone_seconds: float | None  # of the same step in one process, in the same micro-batches
    advice: str

    @property
    def efficiency(self) -> float | None:
        """The share of N times the speed of one process that is reached."""
        if not self.step_seconds or not self.alone_seconds:
            return None
        return self.alone_seconds / (self.processes * self.step_seconds)

    def lines(self) -> tuple[str, ...]:
        """The plan in three lines, for people."""
        speed = "" if self.efficiency is None else f", {self.efficiency:.0%} of {self.processes} times the speed of one"
        takes, sends = format_bytes(self.plan.peak_bytes), format_bytes(self.sent_bytes_per_step)
        links = f"links of {self.link_bytes_per_second / 1e9:.3g} GB/s"
        return (
            f"{self.processes} processes, {self.distributed}: each takes {takes} and sends {sends} a step",
            f"{format_seconds(self.step_seconds)} a step{speed} (estimate, {links})",
            self.advice,
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {**asdict(replace(self, plan=None)), "plan": self.plan.to_json(), "efficiency": self.efficiency}  # type: ignore[arg-type]


@quiet_libraries()
def plan_processes(
    recipe: RecipeSource,
    overrides: Mapping[str, Any] | None = None,
    *,
    n: int,
    profile: str | None = None,
    link_rate: str | None = None,
) -> SharedPlan:
    """What a run takes in each of `n` processes, each with a GPU; other arguments are those of `plan`.

    On a CPU the processes share the memory of this machine. `link_rate` is the bytes a second that each sends while it
    receives as much, e.g. "12GB"; by default it is what is known of the device, all being in one machine.

    Raises:
        InputError: as `plan`; or train_batch_size cannot be divided among `n` processes, or the rate is not one.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    config, _ = find_config(resolved.model)
    device = named_profile(profile) if profile else _here(detect_device(resolved.model.device), n)
    if link_rate is not None:
        try:
            device = replace(device, links=Links(parse_bytes(link_rate)))
        except UnlikelySizeError as error:
            raise InputError(f"--link-rate {link_rate!r} is {error}") from error
        except ValueError as error:
            raise InputError(f"--link-rate {link_rate!r} is not a rate; write bytes a second, e.g. 12GB") from error
    share = share_of(resolved, n)
    batches, _ = read_batches(share)
    return plan_shared(resolved, config, device, n, None if batches is None else among(batches, n))


def _here(device: Device, n: int) -> Profile:
    return profile_of(device, n if device.type == "cpu" else 1)


def share_of(recipe: Recipe, n: int) -> Recipe:
    """The recipe of one of `n` processes, with its rows of a step."""
    return recipe.model_copy(update={"training": for_one_process(recipe.training, n)})


def among(batches: Batches, n: int) -> Batches:
    """The same batches with one process's share of the rows."""
    return replace(batches, n_rows=None if batches.n_rows is None else -(-batches.n_rows // n))


def plan_shared(recipe: Recipe, config: Any, profile: Profile, n: int, batches: Batches | None = None) -> SharedPlan:
    """What a step of `recipe` takes in each of `n` processes on devices like `profile`; `batches` are its share.

    Raises:
        RecipeError: train_batch_size cannot be divided among `n` processes.
    """
    share = share_of(recipe, n)
    dtype, _notes = compute_dtype(recipe.quantization.bnb_4bit_compute_dtype, profile)
    sizes = Sizes.of(config, recipe, dtype)
    n_shards = shards_among(recipe.training, n)
    in_shards = n_shards > 1
    whole = make_plan(share, config, profile, batches)
    made = make_plan(share, config, profile, batches, n_shards=n_shards) if in_shards else whole
    made = replace(made, rows_per_step=rows_per_step(recipe.training, n), step_rule=step_in_words(recipe.training, n))
    split = in_micro_batches(share.training, made.micro_batch).gradient_accumulation_steps
    sent = sent_bytes(sizes, n, split if in_shards else 0, n_shards)
    fetched = _fetched_bytes(sizes, n_shards, split) if in_shards and recipe.training.fsdp_cpu_offload else 0
    alone = None if made.step_seconds is None else n * made.step_seconds
    rate = profile.links.rate(n_shards if in_shards else n)  # most of what is sent stays within a group
    on_links = sent / rate + fetched / _HOST_LINK
    seconds = None if made.step_seconds is None else max(made.step_seconds, on_links)
    advice = _advice(whole, sizes, n, in_shards, sent)
    return SharedPlan(n, "fsdp" if in_shards else "ddp", made, sent, rate, seconds, alone, advice)


def plan_training(
    recipe: Recipe, config: Any, profile: Profile, batches: Batches, micro_batch: int | None = None, n_shards: int = 1
) -> Plan:
    """The plan of a training on this machine, whatever larger budget it was given.

    `micro_batch` is the rows at a time of the run that it resumes.
    """
    budget = min(recipe.training.memory_budget or profile.memory_bytes, profile.memory_bytes)
    training = recipe.training.model_copy(update={"memory_budget": budget})
    recipe = recipe.model_copy(update={"training": training})
    # Dropout follows the micro-steps, so a resumed run keeps its split as long as that divides the batch.
    if micro_batch and recipe.training.per_device_train_batch_size % micro_batch:
        micro_batch = None
    return make_plan(recipe, config, profile, batches, micro_batch=micro_batch, n_shards=n_shards)


def sent_bytes(sizes: Sizes, n: int, micro_batches: int = 0, n_shards: int = 1) -> int:
    """Bytes that each process sends in a step, under ddp (`n_shards` 1) or in shards."""
    gradients = 4 * sizes.trained
    if n_shards == 1:
        return 2 * gradients * (n - 1) // n
    within = (sizes.passed + gradients) * (n_shards - 1) // n_shards
    n_copies = n // n_shards
    between = 2 * gradients // n_shards * (n_copies - 1) // n_copies
    return micro_batches * (within + between)


def _fetched_bytes(sizes: Sizes, n_shards: int, micro_batches: int) -> int:
    """Bytes of its own shards that each process moves between host and device in a step."""
    return micro_batches * (sizes.passed + 2 * 4 * sizes.trained) // n_shards


def _advice(whole: Plan, sizes: Sizes, n: int, in_shards: bool, sent: int) -> str:
    budget = format_bytes(whole.budget_bytes)
    if n == 1:
        return "one process sends nothing"
    if not in_shards:
        return (
            f"the whole model fits into {budget}: sharding is not worth it"
            if whole.fits
            else f"the whole model takes {format_bytes(whole.peak_bytes)} of {budget}: use --distributed fsdp"
        )
    if whole.fits:
        ddp = format_bytes(sent_bytes(sizes, n))
        return (
            f"sharding is not worth it: the whole model fits into {budget}, and ddp sends {ddp} a step, not "
            f"{format_bytes(sent)}"
        )
    return f"sharding is needed: the whole model takes {format_bytes(whole.peak_bytes)} of {budget}"
