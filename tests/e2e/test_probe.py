"""The learning-rate probe: what it chooses, what it costs, and that nothing of it stays in the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.errors import InputError
from nybble.intervals import Sums
from nybble.training.lr_probe import Branch, _lowest_of_the_best


def words(base: Path, rows: Path, *more: object) -> list[object]:
    flags = {"model_name_or_path": base, "dataset_name": rows, "device": "cpu", "max_steps": 126}
    fixed = {"logging_steps": 50, "max_new_tokens": 4, "eval_fraction": 0.2, "lora_dropout": 0.1, "n_samples": 0}
    return [word for name, value in (flags | fixed).items() for word in (f"--{name}", value)] + list(more)


@pytest.mark.parametrize("method", ["qlora", pytest.param("full", marks=pytest.mark.nightly)])
def test_a_probed_run_is_the_run_with_that_rate(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path, method: str
) -> None:
    common = words(tiny_llama(), rows_file, "--method", method)
    probed = nybble("train", *common, "--learning_rate", "probe", "--output_dir", tmp_path / "a", "--json")
    assert probed.code == 0, probed.err
    probe = probed.json["probe"]
    rates = [branch["learning_rate"] for branch in probe["branches"]]
    assert len(rates) == 5
    assert probe["learning_rate"] in rates
    assert probe["steps"] == 3
    assert 0 < probe["share"] <= 0.15
    assert f"learning rate {probe['learning_rate']:g} by probe" in " ".join(probed.json["notes"])
    assert json.loads((tmp_path / "a" / "probe.json").read_text()) == probe
    losses = [branch["loss"] for branch in probe["branches"]]
    assert len(set(losses)) == 5
    assert {p.name for p in (tmp_path / "a" / "checkpoints").iterdir()} == {"checkpoint-126"}

    given = nybble("train", *common, "--learning_rate", probe["learning_rate"], "--output_dir", tmp_path / "b")
    assert given.code == 0, given.err
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_verb_finds_the_same_and_keeps_nothing(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = nybble("probe", *words(tiny_llama(), rows_file, "--output_dir", out), "--json")
    assert done.code == 0, done.err
    assert len(done.json["branches"]) == 5
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--max_steps", "124"), "train 125 steps or more"), (("--eval_fraction", "0"), "there are none")],
)
def test_what_cannot_be_probed_is_refused(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, more: tuple[str, str], message: str
) -> None:
    done = nybble("probe", *words(tiny_llama(), rows_file, *more))
    assert done.code == 2
    assert message in done.err


def judged(*losses: float) -> tuple[list[Branch], list[Sums | None]]:
    """Branches at rates 1, 2, .. whose four rows differ by a little noise; NaN: diverged."""
    branches = [Branch(i + 1.0, None if math.isnan(loss) else loss) for i, loss in enumerate(losses)]
    shaken = [Sums([loss, loss + 0.1, loss - 0.1 * (-1) ** i, loss], [1] * 4) for i, loss in enumerate(losses)]
    return branches, [None if b.loss is None else s for b, s in zip(branches, shaken, strict=True)]


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ((3.0, 2.0, 1.0), 3.0),
        ((3.0, 1.01, 1.0), 2.0),  # within noise: the lower
        ((3.0, 1.0, math.nan), 2.0),
        ((math.nan, math.nan, 2.0), 3.0),
    ],
)
def test_the_lowest_rate_that_cannot_be_told_from_the_best(losses: tuple[float, ...], rate: float) -> None:
    assert _lowest_of_the_best(*judged(*losses)) == rate


def test_where_every_rate_diverges_there_is_none() -> None:
    with pytest.raises(InputError, match="not a number at any probed learning rate"):
        _lowest_of_the_best(*judged(math.nan, math.nan))
