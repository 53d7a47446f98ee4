"""Which type each matrix of a quantized GGUF file has: llama.cpp's mixes, and what rows of other lengths become.

The facts are those of `src/llama-quant.cpp` of https://github.com/ggml-org/llama.cpp (2026-10): values and the second
matrix of the MLP get more bits, in the mixes that are called M in some layers, in those called S in the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from nybble.errors import RecipeError

# Mix -> the type of most matrices.
MIXES = {
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
}
PLAIN = ("F16", "BF16", "Q8_0")
# What rows get that are not whole blocks of 256, and what where they are not whole blocks of 32 either.
FALLBACKS = {"Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAST_FALLBACK = "F16"


@dataclass(frozen=True)
class Chosen:
    """The type of a matrix, and the one that the mix wanted where its rows do not allow that."""

    kind: str
    wanted: str | None = None


def read_types(text: str) -> list[str]:
    """The types that are named in `text`, with commas between them, in any case.

    Raises:
        RecipeError: one of them is unknown, or none is given.
    """
    names = [name.strip().upper() for name in text.split(",") if name.strip()]
    known = (*MIXES, *PLAIN)
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f" did you mean {near[0]}?" if near else ""
            raise RecipeError(f"quantize: got {name!r};{meant} allowed: {', '.join(known)}")
    if not names:
        raise RecipeError(f"quantize: got nothing; allowed: {', '.join(known)}")
    return list(dict.fromkeys(names))


def choose_types(
    mix: str, shapes: Mapping[str, Sequence[int]], blocks: Mapping[str, int], architecture: str
) -> dict[str, Chosen]:
    """The types of matrices, by their places in the file.

    Args:
        mix: one of `MIXES`.
        shapes: `(.., columns)` of each, by place.
        blocks: how many weights a block of each type has.
        architecture: llama.cpp's name.
    """
    ordered = sorted(shapes, key=_layer)
    values = [place for place in ordered if "attn_v." in place or "attn_qkv." in place]
    downs = [place for place in ordered if "ffn_down." in place]
    found = {}
    for place in ordered:
        columns = shapes[place][-1]
        wanted = MIXES[mix]
        is_head = place == "output.weight" or (place == "token_embd.weight" and "output.weight" not in shapes)
        if is_head:
            whole = columns % blocks[wanted] == 0
            wanted = "Q6_K" if whole and architecture != "falcon" else "Q8_0"
        elif "attn_v." in place:
            wanted = _of_values(mix, values.index(place), len(values))
        elif "attn_qkv." in place:
            wanted = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(mix, wanted)
        elif "ffn_down." in place:
            wanted = _of_down(mix, downs.index(place), len(downs), architecture)
        elif "attn_output." in place and (architecture != "falcon" or mix == "Q3_K_L"):
            larger = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K" if architecture == "falcon" else "Q5_K"}
            wanted = larger.get(mix, wanted)
        kind = wanted
        if columns % blocks[kind]:
            kind = FALLBACKS.get(kind, LAST_FALLBACK)
        if columns % blocks[kind]:
            kind = LAST_FALLBACK
        found[place] = Chosen(kind, None if kind == wanted else wanted)
    return found


def _layer(place: str) -> tuple[int, str]:
    parts = place.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, place)


def _gets_more(layer: int, layers: int) -> bool:
    """The first and the last eighth, and each third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _of_values(mix: str, layer: int, layers: int) -> str:
    if mix == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mix == "Q3_K_L":
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, layers):
        return "Q6_K"
    if mix == "Q4_K_S" and layer < 4:
        return "Q5_K"
    return MIXES[mix]


def _of_down(mix: str, layer: int, layers: int, architecture: str) -> str:
    is_falcon = architecture == "falcon"
    more = _gets_more(layer, layers)
    if mix == "Q3_K_M":
        if layer < layers // 16:
            return "Q5_K"
        return "Q4_K" if not is_falcon or more else "Q3_K"
    if mix == "Q3_K_L":
        return "Q4_K" if is_falcon else "Q5_K"
    if mix == "Q4_K_M" and is_falcon:
        return "Q6_K" if layer < layers // 16 else "Q5_K" if more else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M") and more:
        return "Q6_K"
    if mix == "Q4_K_S" and not is_falcon and layer < layers // 8:
        return "Q5_K"
    return MIXES[mix]
