"""Parts of the training loop by themselves: optimizers by name, the order of rows, the objective."""

from __future__ import annotations

import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nybble.data import Groups, PadBatch
from nybble.data.encode import Example
from nybble.errors import RecipeError
from nybble.hardware import detect_device
from nybble.recipe import TrainingSection
from nybble.training.dataloader import StepLoader, epoch_order
from nybble.training.objective import next_token_loss
from nybble.training.optim import (
    check_optimizer_and_schedule,
    create_optimizer,
    create_schedule,
    learning_rate_of,
    parameter_groups,
)
from nybble.training.stopping import Stops


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4)
        self.input_layernorm = nn.Linear(4, 4)  # by its name alone
        self.other = nn.LayerNorm(4)


def test_the_groups_of_an_optimizer_are_those_of_transformers() -> None:
    from transformers import Trainer

    model = Tiny()
    model.linear.weight.requires_grad_(False)
    decayed, others = parameter_groups(model, TrainingSection(weight_decay=0.1))
    names = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    expected = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in expected]
    assert len(decayed["params"]) + len(others["params"]) == sum(p.requires_grad for p in model.parameters())
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw_torch", "AdamW"), ("adafactor", "Adafactor"), ("sgd", "SGD"), ("rmsprop", "RMSprop")]
)
def test_an_optimizer_is_made_by_its_name(name: str, kind: str, tmp_path: Path) -> None:
    section = TrainingSection(optim=name, output_dir=str(tmp_path / "run"), learning_rate=0.5, adam_beta1=0.8)
    optimizer = create_optimizer(Tiny(), section, detect_device("cpu"))
    assert type(optimizer).__name__ == kind
    assert learning_rate_of(optimizer) == 0.5
    assert name != "adamw_torch" or optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    assert not (tmp_path / "run").exists()


def test_a_schedule_warms_up_and_decays() -> None:
    optimizer = torch.optim.SGD(Tiny().parameters(), lr=1.0)
    schedule = create_schedule(optimizer, TrainingSection(lr_scheduler_type="linear", warmup_ratio=0.25), 8)
    rates = []
    for _ in range(8):
        rates.append(learning_rate_of(optimizer))
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def rates(section: TrainingSection, steps: int) -> list[float]:
    """The learning rate of each step, for a peak of 1."""
    optimizer = torch.optim.SGD(Tiny().parameters(), lr=1.0)
    schedule = create_schedule(optimizer, section, steps)
    found = []
    for _ in range(steps):
        found.append(learning_rate_of(optimizer))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("warmup", "steps"), [(2, 2), (0, 0), (0.5, 4), (3.0, 3)])
def test_warmup_steps_count_instead_of_the_ratio(warmup: float, steps: int) -> None:
    found = rates(TrainingSection(lr_scheduler_type="constant_with_warmup", warmup_steps=warmup, warmup_ratio=0.9), 8)
    assert found == pytest.approx([min(1.0, step / steps) if steps else 1.0 for step in range(8)])


def test_arguments_reach_the_schedule_and_the_optimizer(tmp_path: Path) -> None:
    restarts = TrainingSection(
        lr_scheduler_type="cosine_with_restarts", warmup_steps=0, lr_scheduler_kwargs={"num_cycles": 2}
    )
    found = rates(restarts, 8)
    assert found[4] == pytest.approx(1.0)
    assert rates(restarts.model_copy(update={"lr_scheduler_kwargs": {}}), 8)[4] == pytest.approx(0.5)
    section = TrainingSection(optim="adamw_torch", adam_epsilon=1e-5, output_dir=str(tmp_path), learning_rate=1.0)
    assert create_optimizer(Tiny(), section, detect_device("cpu")).param_groups[0]["eps"] == 1e-5
    pytest.importorskip("bitsandbytes")
    section = TrainingSection(optim="ademamix", output_dir=str(tmp_path), optim_args="alpha=3.0", learning_rate=1.0)
    assert create_optimizer(Tiny(), section, detect_device("cpu")).param_groups[0]["alpha"] == 3.0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("cosine", {"cycles": 2}), ("warmup_stable_decay", {}), ("polynomial", {"lr_end": 5.0}), ("constant", {"x": 1})],
)
def test_arguments_that_a_schedule_does_not_take_are_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"training.lr_scheduler_kwargs: {name} does not take"):
        check_optimizer_and_schedule(TrainingSection(lr_scheduler_type=name, lr_scheduler_kwargs=arguments))
    fine = TrainingSection(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5})
    check_optimizer_and_schedule(fine)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_an_evaluation_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"lr_scheduler_type: {name} follows the loss of regular evaluations"):
        check_optimizer_and_schedule(TrainingSection(lr_scheduler_type=name))


def test_an_optimizer_that_updates_within_the_backward_pass_is_refused() -> None:
    with pytest.raises(RecipeError, match="adalomo updates weights within the backward pass"):
        check_optimizer_and_schedule(TrainingSection(optim="adalomo"))


def test_the_order_is_that_of_accelerates_sampler() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    for epoch in (0, 1, 5):
        sampler = SeedableRandomSampler(range(14), generator=torch.Generator(), data_seed=3)
        sampler.set_epoch(epoch)
        assert epoch_order(14, 3, epoch).tolist() == list(sampler)


def test_the_cursor_counts_the_groups_that_are_done() -> None:
    rows = Groups([Example([5, 6], [5, 6], 1, 1, 0, (2,), 0, 0, False, number) for number in range(14)])
    section = TrainingSection(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    loader = StepLoader(rows, PadBatch(0), section)
    assert [len(loader.micro_batches_of(step)) for step in range(4)] == [3, 3, 1, 3]
    places = [(step, done, loader.cursor(step, done)) for step, done in ((0, 2), (2, 0), (2, 1), (3, 0))]
    assert [(c["epoch"], c["groups"]) for _, _, c in places] == [(0, 4), (0, 12), (0, 14), (1, 0)]


class MeanOnly(nn.Module):
    """A model that divides its loss by its own tokens, as some of transformers do."""

    accepts_loss_kwargs = False

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        assert use_cache is False
        chosen = labels[..., 1:] != -100
        return types.SimpleNamespace(loss=input_ids[..., 1:][chosen].float().mean())


def test_a_loss_that_is_a_mean_weighs_by_learned_tokens() -> None:
    batches = [
        {"input_ids": torch.tensor([[9, 1, 2, 3]]), "labels": torch.tensor([[9, 1, 2, 3]])},
        {"input_ids": torch.tensor([[9, 8]]), "labels": torch.tensor([[9, 8]])},
    ]
    shares = [next_token_loss(MeanOnly(), batch, torch.tensor(4.0)) for batch in batches]
    assert sum(shares).item() == (1 + 2 + 3 + 8) / 4


def test_the_time_limit_leaves_room_for_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stops = Stops(120.0, lambda: 4.0)
    asked = []
    for _ in range(4):
        now[0] += 3.0
        asked.append(stops.within_step())
    assert asked == [False, False, True, True]  # at 109: 109 + 3 + 2 * 4 >= 120
    assert stops.reason == "max_seconds"
    assert stops.after_step()
