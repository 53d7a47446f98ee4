"""Settings that are sizes: text in a recipe, bytes in the program, text again in a saved recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nybble.errors import RecipeError
from nybble.recipe import load_recipe, save_recipe


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("7.5 GB", 7_500_000_000),
        ("900M", 900_000_000),
        ("0.1TiB", 109951162777),
        (".5kib", 512),
        ("4096000", 4_096_000),
        ("12b", 12),
        (4_096_000, 4_096_000),
        ("none", None),
    ],
)
def test_a_size_becomes_bytes(tmp_path: Path, text: str | int, n_bytes: int | None) -> None:
    recipe = load_recipe(None, {"memory_budget": text})
    assert recipe.training.memory_budget == n_bytes
    file = tmp_path / "saved.yaml"
    file.write_text(save_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("value", "n_bytes", "saved"),
    [
        (64, 64 * 2**30, "64GiB"),
        ("0.5", 2**29, "512MiB"),
        ("64B", 64, "64B"),
        ("7.5GB", 7_500_000_000, "7500MB"),
        ("1TB", 10**12, "1TB"),
    ],
)
def test_a_cache_limit_without_a_unit_counts_gib(tmp_path: Path, value: float | str, n_bytes: int, saved: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"cache_limit: {value}\n")
    recipe = load_recipe(file)
    assert recipe.quantization.cache_limit == n_bytes
    assert f"cache_limit: {saved}\n" in save_recipe(recipe)
    file = tmp_path / "saved.yaml"
    file.write_text(save_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize("name", ["memory_budget", "cache_limit"])
@pytest.mark.parametrize("value", ["lots", "8GG", "-1GiB", "0", 0, -5, ".inf", "1e9", "9" * 5000, [8]])
def test_a_size_that_cannot_be_meant_is_refused(name: str, value: Any) -> None:
    pattern = f"{name}: got .*; write an amount of memory such as 8GiB, 7.5GB or a number of (GiB|bytes)"
    with pytest.raises(RecipeError, match=pattern):
        load_recipe(None, {name: value})


@pytest.mark.parametrize(("value", "meant"), [("8", "8GiB"), (24, "24GiB"), ("1023", "1023GiB"), (8192, "8192MiB")])
def test_bytes_that_are_hardly_meant_are_answered_with_what_is(value: Any, meant: str) -> None:
    said = f"memory_budget: got .*; this is {int(value):,} bytes; write {meant} if that is meant"
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, {"memory_budget": value})
    load_recipe(None, {"memory_budget": meant})
