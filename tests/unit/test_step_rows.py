"""Rows of a step: per device as in transformers, or fixed for any number of processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import RecipeError
from nybble.recipe import for_one_process, in_micro_batches, load_recipe, rows_per_step, step_in_words

COUNTS = st.integers(1, 64)


@given(COUNTS, COUNTS, COUNTS)
def test_each_process_adds_its_rows(size: int, accumulated: int, n: int) -> None:
    training = load_recipe(
        None, {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    ).training
    assert for_one_process(training, n) == training
    assert rows_per_step(training, n) == size * accumulated * n


@given(COUNTS, COUNTS, COUNTS)
def test_a_fixed_number_of_rows_is_that_for_any_number_of_processes(most: int, share: int, n: int) -> None:
    training = load_recipe(None, {"per_device_train_batch_size": most, "train_batch_size": share * n}).training
    own = for_one_process(training, n)
    assert own.per_device_train_batch_size <= most
    assert own.train_batch_size is None
    assert rows_per_step(training, n) == rows_per_step(own, n) == share * n


@given(st.integers(2, 64), st.integers(1, 640))
def test_rows_that_cannot_be_divided_are_refused(n: int, rows: int) -> None:
    training = load_recipe(None, {"train_batch_size": rows}).training
    if rows % n:
        with pytest.raises(RecipeError, match=f"train_batch_size {rows} cannot be divided among {n} processes"):
            for_one_process(training, n)
    else:
        assert rows_per_step(for_one_process(training, n), n) == rows


def test_accumulation_follows_from_a_fixed_number_of_rows() -> None:
    with pytest.raises(RecipeError, match="gradient_accumulation_steps follows from train_batch_size"):
        load_recipe(None, {"train_batch_size": 8, "gradient_accumulation_steps": 2})


@pytest.mark.parametrize(
    ("settings", "n", "words"),
    [
        ({}, 1, "4 rows per step: per_device_train_batch_size 4 x gradient_accumulation_steps 1 x 1 process"),
        (
            {"grad_accum": 2},
            4,
            "32 rows per step: per_device_train_batch_size 4 x gradient_accumulation_steps 2 x 4 pro",
        ),
        ({"train_batch_size": 24}, 2, "24 rows per step, fixed by train_batch_size: 4 rows x 3 x 2 processes"),
        ({"global_batch_size": 6}, 2, "6 rows per step, fixed by train_batch_size: 3 rows x 1 x 2 processes"),
    ],
)
def test_the_rule_is_said(settings: dict[str, int], n: int, words: str) -> None:
    assert step_in_words(load_recipe(None, settings).training, n).startswith(words)


def test_micro_batches_keep_the_step() -> None:
    training = load_recipe(None, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}).training
    for size in (8, 4, 2, 1):
        assert rows_per_step(in_micro_batches(training, size), 2) == 48
