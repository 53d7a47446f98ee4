"""NEFTune's noise: how large it is, what it depends on, and that nothing but training has it. LoRA+'s rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.hardware import detect_device
from nybble.recipe import TrainingSection
from nybble.training.neftune import EmbeddingNoise
from nybble.training.optim import create_optimizer, create_schedule, learning_rate_of

WIDTH = 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def noise_of(ids: Tensor, step: int, rows: Sequence[int], lengths: Sequence[int], seed: int = 0) -> Tensor:
    model = Model()
    with EmbeddingNoise(model, 5.0, seed) as noise, torch.no_grad():
        noise.begin(step, rows, lengths)
        noisy: Tensor = model.embedding(ids)
    return noisy - model.embedding(ids).detach()


def test_it_is_as_large_as_the_paper_says() -> None:
    found = noise_of(torch.zeros(1, 50, dtype=torch.int64), 3, [1, 2], [40, 8])
    for first, length in ((0, 40), (40, 8)):
        part, most = found[0, first : first + length], 5.0 / math.sqrt(length * WIDTH)
        assert 0.95 * most < part.abs().max() <= most * (1 + 1e-5)
        assert abs(part.mean()) < 0.1 * most
        assert part.std() == pytest.approx(most / math.sqrt(3), rel=0.1)
    assert not found[0, 48:].any()  # what rounding the length of a batch up has added


def test_it_follows_from_seed_step_and_row_and_from_nothing_else() -> None:
    ids = torch.arange(30)
    flat = noise_of(ids[None, :12], 3, [7, 4], [8, 4])
    padded = noise_of(torch.stack([ids[:8], ids[8:16]]), 3, [7, 4], [8, 4])
    other_place = noise_of(ids[None, :13], 3, [4, 9, 7], [4, 1, 8])
    assert torch.allclose(flat[0, :8], padded[0], atol=1e-6)
    assert torch.allclose(flat[0, 8:], padded[1, :4], atol=1e-6)
    assert not padded[1, 4:].any()
    assert torch.allclose(flat[0, 8:], other_place[0, :4], atol=1e-6)
    assert torch.allclose(flat[0, :8], other_place[0, 5:], atol=1e-6)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    Model()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    again = noise_of(ids[None, :12], 3, [7, 4], [8, 4])
    assert torch.allclose(again, flat, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), after)  # only making the model has drawn from torch's generator
    for changed in (noise_of(ids[None, :12], 4, [7, 4], [8, 4]), noise_of(ids[None, :12], 3, [7, 4], [8, 4], seed=1)):
        assert (changed - flat).abs().max() > 0.1
    assert (noise_of(ids[None, :12], 3, [8, 4], [8, 4])[0, :8] - flat[0, :8]).abs().max() > 0.1


def test_only_training_has_it_and_it_leaves_the_model_as_it_was() -> None:
    model, ids = Model(), torch.zeros(1, 4, dtype=torch.int64)
    plain = model.embedding(ids)
    with EmbeddingNoise(model, 5.0, 0) as noise:
        noise.begin(0, [1], [4])
        assert not torch.equal(model.embedding(ids), plain)
        model.eval()
        assert torch.equal(model.embedding(ids), plain)
        model.train()
        noise.begin(0, [], [])  # a batch of which nothing is learned
        assert torch.equal(model.embedding(ids), plain)
    assert torch.equal(model.embedding(ids), plain)
    with EmbeddingNoise(model, None, 0) as noise:
        noise.begin(0, [1], [4])
        assert torch.equal(model.embedding(ids), plain)


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        self.lora_magnitude_vector = nn.Linear(2, 4)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = Adapted()
        self.input_layernorm = nn.LayerNorm(4)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_b_learns_faster_under_lora_plus(optim: str, tmp_path: Path) -> None:
    model = Whole()
    section = TrainingSection(
        optim=optim, learning_rate=0.5, loraplus_lr_ratio=4, weight_decay=0.25, warmup_steps=2, output_dir=str(tmp_path)
    )
    optimizer = create_optimizer(model, section, detect_device("cpu"))
    rates: dict[int, Any] = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    b = model.q_proj.lora_B["default"].weight
    assert rates.pop(id(b)) == (2.0, 0.25)
    assert {rate for rate, _ in rates.values()} == {0.5}
    assert len(rates) == sum(1 for _ in model.parameters()) - 1
    schedule = create_schedule(optimizer, section, 8)
    optimizer.step()
    schedule.step()  # within the warmup: half of each
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 1.0]
    assert learning_rate_of(optimizer) == 0.25


def test_the_rates_are_those_of_pefts_lora_plus(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

    model = get_peft_model(Base(), LoraConfig(r=2, target_modules=["linear"]))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=16)
    section = TrainingSection(learning_rate=0.5, loraplus_lr_ratio=16, output_dir=str(tmp_path))
    ours = create_optimizer(model, section, detect_device("cpu"))
    found = [
        {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in (ours, theirs)
    ]
    assert found[0] == found[1]
    assert sorted(found[0].values()) == [0.5, 8.0]
