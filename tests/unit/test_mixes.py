"""Types by tensor: llama.cpp's mixes, what short rows become, and names that are not known."""

from __future__ import annotations

from collections import Counter

import pytest

from nybble.errors import RecipeError
from nybble.exporting.mixes import MIXES, choose_types, read_types

BLOCKS = {
    "F16": 1,
    "Q8_0": 32,
    "Q5_0": 32,
    "Q5_1": 32,
    "IQ4_NL": 32,
    "Q3_K": 256,
    "Q4_K": 256,
    "Q5_K": 256,
    "Q6_K": 256,
}


def shapes(width: int, inner: int, layers: int, *, has_head: bool) -> dict[str, tuple[int, int]]:
    found = {"token_embd.weight": (1000, width)} | ({"output.weight": (1000, width)} if has_head else {})
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            found[f"blk.{layer}.{name}.weight"] = (width, width)
        found[f"blk.{layer}.ffn_down.weight"] = (width, inner)
    return found


# Counted in files that llama.cpp's own quantizer wrote of SmolLM2-135M (width 576, 30 layers).
@pytest.mark.parametrize(
    ("mix", "q6", "fallbacks"),
    [
        ("Q4_K_M", {"Q6_K": 14, "Q4_K": 16}, {"Q5_0": 166, "Q8_0": 15}),
        ("Q4_K_S", {"Q5_K": 3, "Q4_K": 27}, {"Q5_0": 176, "Q5_1": 4, "Q8_0": 1}),
        ("Q5_K_M", {"Q6_K": 14, "Q5_K": 16}, {"Q5_1": 166, "Q8_0": 15}),
        ("Q6_K", {"Q6_K": 30}, {"Q8_0": 181}),
    ],
)
def test_a_model_with_short_rows_has_the_types_of_llama_cpp(
    mix: str, q6: dict[str, int], fallbacks: dict[str, int]
) -> None:
    chosen = choose_types(mix, shapes(576, 1536, 30, has_head=False), BLOCKS, "llama")
    assert Counter(one.kind for one in chosen.values()) == Counter(q6 | fallbacks)
    assert chosen["token_embd.weight"].kind == "Q8_0"
    assert chosen["blk.1.attn_q.weight"].wanted == MIXES[mix]
    assert chosen["blk.0.ffn_down.weight"].wanted is None


@pytest.mark.parametrize("mix", MIXES)
def test_whole_rows_have_no_fallback(mix: str) -> None:
    chosen = choose_types(mix, shapes(1024, 2048, 8, has_head=True), BLOCKS, "llama")
    assert all(one.wanted is None for one in chosen.values())
    assert chosen["output.weight"].kind == "Q6_K"
    assert chosen["token_embd.weight"].kind == MIXES[mix]


def test_rows_of_any_length_become_float16() -> None:
    chosen = choose_types("Q4_K_M", {"blk.0.attn_q.weight": (8, 40), "token_embd.weight": (8, 40)}, BLOCKS, "llama")
    assert {one.kind for one in chosen.values()} == {"F16"}


def test_names_are_read_in_any_case_and_once() -> None:
    assert read_types("q4_k_m, Q8_0,q4_k_m") == ["Q4_K_M", "Q8_0"]


@pytest.mark.parametrize(
    ("text", "says"), [("Q4_KM", r"did you mean Q4_K_M\?"), ("zz", r"got 'ZZ'; allowed: Q3_K_S"), (" ,", "got nothing")]
)
def test_unknown_names_are_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read_types(text)
