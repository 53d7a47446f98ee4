"""The operator: bit-identical to the reference, and well-behaved under torch's own checks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nybble.kernels import dequantize, multiply, quantize
from nybble.quant import BLOCK_SIZES, QUANT_TYPES, PackedWeight, decode, encode, encode_searched

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (5, 7), (37, 53), (8, 64), (4160,), (2, 3, 64), (300, 128))


def arguments(weight: PackedWeight, dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_offset,
        weight.quant_type,
        weight.block_size,
        weight.shape,
        dtype,
    )


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_operator_has_the_bits_of_the_reference(quant_type: str, block_size: int) -> None:
    for shape, double_quant in product(SHAPES, (False, True)):
        packed = encode(torch.randn(shape), quant_type, block_size, double_quant)
        for dtype in DTYPES:
            expected = decode(packed, dtype).view(-1).view(torch.uint8)  # bits: with the sign of zero
            assert torch.equal(dequantize(packed, dtype).view(-1).view(torch.uint8), expected), (shape, dtype)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1025, 1024), (1 << 20,), (1049, 1009)], ids=str)
def test_weights_of_more_than_one_piece_have_the_bits_of_the_reference(shape: tuple[int, ...], block_size: int) -> None:
    packed = encode(torch.randn(shape), block_size=block_size)
    assert torch.equal(dequantize(packed, torch.bfloat16), decode(packed, torch.bfloat16))


def test_float64_holds_the_float32_products() -> None:
    packed = encode(torch.randn(8, 64))
    assert torch.equal(dequantize(packed, torch.float64), decode(packed, torch.float32).double())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(8, 64), (5, 7)], ids=str)
def test_operator_passes_the_checks_of_torch(shape: tuple[int, ...], double_quant: bool) -> None:
    packed = encode(torch.randn(shape), double_quant=double_quant)
    results = torch.library.opcheck(torch.ops.nybble.dequantize_4bit.default, arguments(packed, torch.bfloat16))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_data_it_gives_shape_and_type(dtype: torch.dtype, double_quant: bool) -> None:
    packed = encode(torch.randn(37, 53), double_quant=double_quant)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = dequantize(packed, dtype)
    assert fake.shape == (37, 53)
    assert fake.dtype == dtype
    assert type(fake).__name__ == "FakeTensor"


def test_on_the_meta_device_it_gives_shape_and_type() -> None:
    result = dequantize(encode(torch.randn(37, 53)).to("meta"), torch.bfloat16)
    assert (result.device.type, result.shape, result.dtype) == ("meta", (37, 53), torch.bfloat16)


def test_without_data_a_wrong_number_of_bytes_is_refused() -> None:
    packed, *others = arguments(encode(torch.randn(8, 64)).to("meta"), torch.bfloat16)
    with pytest.raises(RuntimeError, match="bytes do not hold"):
        torch.ops.nybble.dequantize_4bit(packed[1:], *others)


def test_a_wrong_number_of_bytes_is_refused() -> None:
    packed, *others = arguments(encode(torch.randn(8, 64)), torch.bfloat16)
    with pytest.raises(ValueError, match="512 weights need 256 uint8 bytes"):
        torch.ops.nybble.dequantize_4bit(packed[1:], *others)


def test_operator_writes_to_none_of_its_arguments() -> None:
    packed = encode(torch.randn(8, 64))
    before = [tensor.clone() for tensor in arguments(packed, torch.bfloat16)[:4]]
    dequantize(packed, torch.bfloat16).zero_()
    assert all(torch.equal(a, b) for a, b in zip(arguments(packed, torch.bfloat16)[:4], before, strict=True))


def test_result_takes_no_gradient() -> None:
    assert not dequantize(encode(torch.randn(8, 64)), torch.float32).requires_grad


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("encoder", ["absmax", "search"])
@pytest.mark.parametrize("shape", [(8, 64), (5, 7)], ids=str)
def test_encoding_is_the_reference_and_passes_the_checks_of_torch(
    shape: tuple[int, ...], encoder: str, double_quant: bool
) -> None:
    weight = torch.randn(shape)
    expected = (encode if encoder == "absmax" else encode_searched)(weight, "nf4", 64, double_quant)
    made = quantize(weight, "nf4", 64, double_quant, encoder)
    for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
        ours, theirs = getattr(made, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    results = torch.library.opcheck(
        torch.ops.nybble.quantize_4bit.default, (weight, "nf4", 64, double_quant, encoder, True)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_unknown_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder must be one of"):
        quantize(torch.randn(4, 64), encoder="best")


@pytest.mark.parametrize("double_quant", [False, True])
def test_decoding_into_memory_passes_the_checks_of_torch(double_quant: bool) -> None:
    packed = encode(torch.randn(8, 64), double_quant=double_quant)
    out = torch.empty(8, 64, dtype=torch.bfloat16)
    words = arguments(packed, torch.bfloat16)[:6]
    assert set(torch.library.opcheck(torch.ops.nybble.dequantize_4bit_out.default, (*words, out)).values()) == {
        "SUCCESS"
    }
    assert dequantize(packed, torch.bfloat16, out) is out
    assert torch.equal(out, decode(packed, torch.bfloat16))


@pytest.mark.parametrize(
    "out",
    [torch.empty(8, 63), torch.empty(8, 64, dtype=torch.float16), torch.empty(64, 8).t()],
    ids=["shape", "dtype", "strides"],
)
def test_memory_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="out must be contiguous"):
        dequantize(encode(torch.randn(8, 64)), torch.float32, out)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 64), (33, 172), (7, 30)], ids=str)
def test_products_of_a_few_rows(shape: tuple[int, int], rows: int, double_quant: bool) -> None:
    packed, x = encode(torch.randn(shape), double_quant=double_quant), torch.randn(rows, shape[1])
    expected = x.double() @ decode(packed, torch.float32).double().t()
    torch.testing.assert_close(multiply(x, packed).double(), expected, rtol=1e-4, atol=1e-4)
    words = (x, *arguments(packed, torch.float32)[:6], shape[0])
    assert set(torch.library.opcheck(torch.ops.nybble.gemv_4bit.default, words).values()) == {"SUCCESS"}
