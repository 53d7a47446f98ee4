"""What a step must not do: wait for the device, and issue more operations than it needs."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from test_families import adapt, build, gradients, ours_of, rows, share

from nybble.data import FlatBatch, Groups
from nybble.data.encode import Example

# What hands a value to the host, or makes shapes that depend on one.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "item"}


class Seen(TorchDispatchMode):
    """Counts operations; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in ("detach", "empty", "empty_like", "new_empty", "_unsafe_view"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(layers: int, **lora: Any) -> Counter[str]:
    model = build("llama", num_hidden_layers=layers)
    ours = adapt(ours_of(model), **lora)
    share(ours)
    batch = FlatBatch()([rows()])
    gradients(ours, batch)
    with Seen() as seen:
        ours(**batch, num_items_in_batch=24).loss.backward()
    return seen.counts


@pytest.mark.parametrize(
    ("targets", "dropout", "budget"),
    [("q_proj,v_proj", 0.0, 57), ("q_proj,v_proj", 0.1, 63), ("all-linear", 0.0, 98), ("all-linear", 0.1, 119)],
)
def test_operations_of_a_layer_forward_and_backward(targets: str, dropout: float, budget: int) -> None:
    """PEFT alone issues about 25 for each adapted linear."""
    small, large = (operations(n, target_modules=targets, lora_dropout=dropout) for n in (2, 3))
    assert (large - small).total() <= budget, dict(large - small)


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert name not in WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.parametrize("recompute", ["never", "auto", "always"])
def test_no_step_waits_for_the_device(recompute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From drawing a batch to the optimizer's step, accumulation and clipping included; logging may wait."""
    from nybble.hardware import detect_device
    from nybble.recipe import TrainingSection
    from nybble.run.directory import RunDirectory
    from nybble.training import loop, train_model

    ours = adapt(ours_of(build("llama")), lora_dropout=0.1)
    ids = [row["input_ids"] for row in rows((9, 20, 5, 30, 7, 11, 8, 4))]
    examples = [Example(i, list(i), 1, 1, 0, (2,), 0, 0, False) for i in ids]
    section = TrainingSection(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        gradient_checkpointing=recompute, report_to="none", logging_steps=100, num_train_epochs=2,
    )  # fmt: skip
    run = RunDirectory(tmp_path / "run")
    run.create(overwrite=False)
    watched = 0

    def guard(name: str) -> None:
        function = getattr(loop, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal watched
            watched += 1
            with NoWaiting():
                return function(*args, **kwargs)

        monkeypatch.setattr(loop, name, guarded)

    for name in ("forward_backward", "clip_gradients", "update"):
        guard(name)
    train_model(
        ours, None, Groups(examples), section,
        run=run, device=detect_device("cpu"), compute_dtype=torch.float32, max_steps=4,
    )  # fmt: skip
    assert watched == 8 + 4 + 4
