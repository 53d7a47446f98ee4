"""The decoder's AMD machine code, executed without a card, has the bits of the reference.

`amdgcn` beside this file interprets what Triton's compiler leaves for a target. What it cannot show depends on time:
races, waits, caches, hazards.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nybble.quant import PackedWeight, codebook, decode, dynamic_codebook, encode

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")
KINDS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("tools.kernel_code.listing")  # which imports Triton


@pytest.fixture(scope="module")
def amdgcn() -> Iterator[ModuleType]:
    """The interpreter, which lies beside this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("amdgcn")


@pytest.fixture(scope="module")
def compiled(script: ModuleType, triton_cache: None) -> Any:
    """`compiled(variant, target)`: the kernel, compiled once."""
    variants = {variant.name: variant for variant in script.VARIANTS}
    return cache(lambda name, target: script.compiled(variants[name], target))


def decoded(amdgcn: ModuleType, text: str, made: Any, weight: PackedWeight, dtype: torch.dtype) -> np.ndarray:
    """What the machine code makes of `weight`, as bytes."""
    lanes = 64 if "gfx9" in made.metadata.target.arch else 32
    out = torch.full((weight.n_elements,), 7.0, dtype=dtype).view(torch.uint8).numpy()
    nested, offset = weight.nested_absmax, weight.nested_offset
    assert nested is not None
    assert offset is not None
    tensors = (weight.packed, weight.absmax, dynamic_codebook(), nested, offset.view(1), codebook(weight.quant_type))
    arguments = [*(tensor.contiguous().view(-1).numpy() for tensor in tensors), out, weight.n_elements]
    groups = -(-weight.n_elements // 8192)
    amdgcn.Kernel(text, lanes).run(arguments, groups, made.metadata.num_warps * lanes, made.metadata.shared)
    return out


def wanted(weight: PackedWeight, dtype: torch.dtype) -> np.ndarray:
    return decode(weight, dtype).contiguous().view(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_machine_code_has_the_bits_of_the_reference(
    amdgcn: ModuleType, compiled: Any, kind: str, target: str
) -> None:
    made = compiled(f"dequantize {kind}", target)
    for quant_type, n in (("nf4", 8192 + 1024 + 16), ("fp4", 48)):
        weight = encode(torch.randn(n) * 3, quant_type)
        assert np.array_equal(
            decoded(amdgcn, made.asm["amdgcn"], made, weight, KINDS[kind]), wanted(weight, KINDS[kind])
        )


@pytest.mark.parametrize("target", ["gfx90a", "gfx1100"])
@pytest.mark.parametrize("n", [1, 31, 37 * 53, 8193])
def test_odd_sizes_have_the_bits_and_nothing_beside_them_is_touched(
    amdgcn: ModuleType, compiled: Any, n: int, target: str
) -> None:
    """Memory ends with the tensors here: a byte more would be an error."""
    made = compiled("dequantize odd size", target)
    weight = encode(torch.randn(n))
    assert np.array_equal(
        decoded(amdgcn, made.asm["amdgcn"], made, weight, torch.bfloat16), wanted(weight, torch.bfloat16)
    )


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        ("gfx90a", "v_add3_u32", "v_or3_b32"),  # rounding to bfloat16
        ("gfx1100", "v_mul_f32_e32", "v_add_f32_e32"),
        ("gfx1201", "s_lshl_b64 s", "s_lshr_b64 s"),
    ],
)
def test_changed_machine_code_has_other_bits_or_leaves_its_memory(
    amdgcn: ModuleType, compiled: Any, target: str, right: str, wrong: str
) -> None:
    made = compiled("dequantize bfloat16", target)
    text = made.asm["amdgcn"]
    assert right in text
    weight = encode(torch.randn(8192 * 2))
    try:
        got = decoded(amdgcn, text.replace(right, wrong), made, weight, torch.bfloat16)
    except IndexError:
        return
    assert not np.array_equal(got, wanted(weight, torch.bfloat16))


def test_a_byte_beside_a_tensor_is_an_error(amdgcn: ModuleType, compiled: Any) -> None:
    made = compiled("dequantize bfloat16", "gfx90a")
    weight = encode(torch.randn(8192))
    cut = replace(weight)
    object.__setattr__(cut, "packed", weight.packed[:-16])
    with pytest.raises(IndexError, match="are in no array"):
        decoded(amdgcn, made.asm["amdgcn"], made, cut, torch.bfloat16)


def test_an_instruction_that_is_not_known_is_refused(amdgcn: ModuleType, compiled: Any) -> None:
    made = compiled("dequantize bfloat16", "gfx1100")
    text = made.asm["amdgcn"].replace("v_add3_u32", "v_mad_i32_i24")
    with pytest.raises(NotImplementedError, match="v_mad_i32_i24"):
        decoded(amdgcn, text, made, encode(torch.randn(8192)), torch.bfloat16)
