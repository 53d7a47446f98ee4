"""The Triton kernels and their launches, run by Triton's interpreter on the CPU, have the bits of the reference.

The interpreter must be chosen before Triton is imported and would then rule the whole process, so the functions of
`nybble.kernels.ops4bit.triton` run in a second one. bfloat16 goes through the kernels as integers and is therefore
exact here too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.quant import BLOCK_SIZES, QUANT_TYPES, PackedWeight, decode, decode_absmax, encode, search

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1,), (5, 7), (31,), (37, 53), (8, 64), (4160,), (2, 3, 64), (100, 128))
Call = Callable[..., tuple[Any, tuple[Any, ...]]]


@pytest.fixture(scope="module")
def call(interpreter: Callable[..., tuple[Any, tuple[Any, ...]]]) -> Call:
    """Calls a function of `nybble.kernels.ops4bit.triton` where Triton interprets: its result, and its arguments."""
    return partial(interpreter, "ops4bit.triton")


def bits(tensor: Tensor) -> Tensor:
    """With the sign of zero."""
    return tensor.reshape(-1).view(torch.uint8)


def same_bits(call: Call, packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether the kernel decodes as the reference does."""
    _, (_, out) = call("dequantize", packed, torch.full(packed.shape, 7.0, dtype=dtype))
    return torch.equal(bits(out), bits(decode(packed, dtype)))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_decoding_has_the_bits_of_the_reference(call: Call, quant_type: str, block_size: int) -> None:
    for i, (shape, double_quant) in enumerate(product(SHAPES, (False, True))):
        packed = encode(torch.randn(shape), quant_type, block_size, double_quant)
        dtype = DTYPES[(i + block_size) % 3]
        assert same_bits(call, packed, dtype), (shape, double_quant, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_several_programs_have_the_bits_of_the_reference(call: Call, dtype: torch.dtype) -> None:
    for n in (8191, 8192, 8193, 40001):  # a program decodes 8,192
        assert same_bits(call, encode(torch.randn(n)), dtype), n


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 3e38])
def test_scales_at_the_ends_of_float32_round_as_in_the_reference(call: Call, scale: float) -> None:
    packed = encode(torch.randn(4096).clamp(-1, 1) * scale, double_quant=False)
    assert same_bits(call, packed, torch.float32)
    assert same_bits(call, packed, torch.bfloat16)


def test_every_bfloat16_tie_goes_to_the_even_neighbour(call: Call) -> None:
    kept = torch.arange(0x3F00, 0x4080, dtype=torch.int32) << 16  # the bits of bfloat16
    absmax = torch.cat([kept + rest for rest in (0x7FFF, 0x8000, 0x8001)]).view(torch.float32)
    packed = torch.full((absmax.numel() * 16, 1), 0xFF, dtype=torch.uint8)  # 1.0 times each scale
    weight = PackedWeight(packed, absmax, (packed.numel() * 2,), 32, "nf4", torch.bfloat16)
    assert same_bits(call, weight, torch.bfloat16)


def test_a_slice_of_a_buffer_is_written_and_nothing_else(call: Call) -> None:
    packed = encode(torch.randn(37, 53))
    buffer = torch.full((5000,), 7.0, dtype=torch.float16)
    _, (_, out) = call("dequantize", packed, buffer[1001 : 1001 + 37 * 53].view(37, 53))
    assert torch.equal(out, decode(packed, torch.float16))
    whole = torch.empty(0, dtype=torch.float16).set_(out.untyped_storage(), 0, (5000,))
    assert (whole[:1001] == 7).all()
    assert (whole[1001 + 37 * 53 :] == 7).all()


def test_codes_at_an_odd_address_are_read(call: Call) -> None:
    weight = encode(torch.randn(37, 53))
    shifted = torch.cat([torch.zeros(1, 1, dtype=torch.uint8), weight.packed])[1:]
    assert same_bits(call, replace(weight, packed=shifted), torch.float32)


def hard(n: int, dtype: torch.dtype) -> Tensor:
    """Weights with outliers, and blocks of zeros, of one value and of the smallest numbers."""
    flat = torch.randn(n) * torch.rand(n).pow(3)
    flat[64:128], flat[128:192] = 0.0, -0.25
    flat[192:256] *= 1e-41
    return flat.to(dtype)


ENCODINGS = [
    ("nf4", 32, 1003, torch.float32, True),
    ("nf4", 64, 1500, torch.bfloat16, True),
    ("fp4", 64, 999, torch.float16, False),
    ("fp4", 128, 700, torch.float32, True),
    ("nf4", 1024, 2100, torch.float32, False),
    ("nf4", 4096, 4160, torch.float16, True),
]


@pytest.mark.parametrize(("quant_type", "block_size", "n", "dtype", "signed"), ENCODINGS)
def test_searched_encoding_has_the_bytes_of_the_reference(
    call: Call, quant_type: str, block_size: int, n: int, dtype: torch.dtype, signed: bool
) -> None:
    flat = hard(n, dtype)
    expected = search.search_scales(flat, quant_type, block_size, signed)
    scales, _ = call("search_scales", flat, quant_type, block_size, signed)
    assert torch.equal(bits(scales), bits(expected))
    nested = (*search.nest_scales(expected),)
    codes, _ = call("nested_codes", flat, quant_type, block_size, expected, *nested)
    assert torch.equal(codes, search.nested_codes(flat, quant_type, block_size, expected, *nested))
    packed, _ = call("nearest_codes", flat, quant_type, block_size, expected)
    assert torch.equal(packed, search.nearest_codes(flat, quant_type, block_size, expected))


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_errors_are_summed_in_the_order_of_the_reference(call: Call, block_size: int) -> None:
    """Each weight has its opposite elsewhere in the block: a scale and its opposite differ in the order of squares."""
    half = torch.randn(32, block_size // 2)
    flat = torch.cat([half, -half[:, torch.randperm(block_size // 2)]], dim=1).view(-1)
    expected = search.search_scales(flat, "nf4", block_size, True)
    assert (expected < 0).any()
    scales, _ = call("search_scales", flat, "nf4", block_size, True)
    assert torch.equal(bits(scales), bits(expected))


def test_nested_scales_of_more_than_one_run_have_the_bytes_of_the_reference(call: Call) -> None:
    flat = torch.randn(300 * 32) * torch.rand(300).repeat_interleave(32)
    scales = flat.view(300, 32).abs().amax(dim=1)
    nested = (*search.nest_scales(scales),)
    codes, _ = call("nested_codes", flat, "nf4", 32, scales, *nested)
    assert torch.equal(codes, search.nested_codes(flat, "nf4", 32, scales, *nested))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_codes_at_midpoints_and_beyond_the_table_are_those_of_the_reference(call: Call, quant_type: str) -> None:
    from nybble.quant import codebook

    ascending = codebook(quant_type).sort().values
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    flat = torch.cat([midpoints, ascending, torch.tensor([5.0, -5.0, 3e38, -3e38, 0.0, -0.0])])[:32].repeat(4)
    scales = torch.tensor([1.0, -1.0, 0.0, float("inf")])
    packed, _ = call("nearest_codes", flat, quant_type, 32, scales)
    assert torch.equal(packed, search.nearest_codes(flat, quant_type, 32, scales))


# |result - expected| / |expected| in float64, 240 products with normal weights, interpreted on an AMD EPYC, 2026-11-23:
# dtype -> mean, standard deviation. Allowed are 8 deviations above the mean.
ERRORS = {torch.float32: (7.8e-8, 2.7e-8), torch.float16: (2.1e-4, 4.6e-5), torch.bfloat16: (1.6e-3, 3.4e-4)}


@pytest.mark.parametrize(("n", "k"), [(5, 7), (37, 53), (9, 200), (16, 4096 + 64), (3, 8)], ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_products_with_a_few_rows_are_those_of_the_decoded_weight(call: Call, quant_type: str, n: int, k: int) -> None:
    cases = product((1, 2, 3, 8), (False, True), (32, 64, 4096))
    for i, (rows, double_quant, block_size) in enumerate(cases):
        weight = encode(torch.randn(n, k), quant_type, block_size, double_quant)
        x = torch.randn(rows, k).to(DTYPES[i % 3])
        result, _ = call("multiply", x, weight)
        expected = x.double() @ decode(weight, torch.float32).double().t()
        assert (result.shape, result.dtype) == (expected.shape, x.dtype)
        mean, deviation = ERRORS[x.dtype]
        error = (result.double() - expected).norm() / expected.norm()
        assert error < mean + 8 * deviation, (rows, double_quant, block_size, x.dtype, error)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    from nybble.kernels.ops4bit import triton as gpu

    weight = encode(torch.randn(8, 64))
    with pytest.raises(ValueError, match="out must be contiguous"):
        gpu.dequantize(weight, torch.empty(64, 8).t())
    for x in (torch.zeros(9, 64), torch.zeros(2, 63), torch.zeros(64), torch.zeros(64, 2).t()):
        with pytest.raises(ValueError, match="x must be contiguous"):
            gpu.multiply(x, weight)


def test_without_triton_the_package_imports(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    code = "import nybble.kernels, sys; assert 'nybble.kernels.ops4bit.triton' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_absmax_of_nested_weights_is_rounded_twice(call: Call) -> None:
    """A product fused with the sum would be rounded once."""
    weight = encode(torch.randn(4096), block_size=32)
    _, (_, out) = call("dequantize", replace(weight, packed=torch.full_like(weight.packed, 0xFF)), torch.empty(4096))
    assert torch.equal(out.view(-1, 32)[:, 0], decode_absmax(weight))
