"""Slices of a real weight, packed by bitsandbytes and decoded by its CUDA kernel, must decode to the same numbers."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nybble.kernels import dequantize
from nybble.quant import PackedWeight, codebook, decode, dynamic_codebook, from_bnb

DOUBLE_QUANT = 2  # the header's format id; 0 is plain
SLICES = {
    "llama_1b_nf4.bin": "nf4",
    "llama_1b_nf4_double_quant.bin": "nf4",
    "llama_1b_fp4.bin": "fp4",
}


@dataclass(frozen=True)
class Slice:
    quant_type: str
    block_size: int
    n_elements: int
    packed: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_table: torch.Tensor | None
    nested_offset: float | None
    expected: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.n_elements // self.block_size, self.block_size)


@pytest.fixture(params=SLICES)
def golden(request: pytest.FixtureRequest, shared_data: Path) -> Slice:
    path = shared_data / "bnb_golden" / request.param
    if not path.is_file():
        pytest.skip(f"golden slice {path.name} is absent")
    return read_slice(path.read_bytes(), SLICES[request.param])


def read_slice(content: bytes, quant_type: str) -> Slice:
    """Little-endian: nine u32 (format, elements, block, six lengths), one f32 (offset), six ranges of bytes."""
    format_id, n, block_size, *lengths = struct.unpack_from("<9I", content)
    (offset,) = struct.unpack_from("<f", content, 36)
    ranges, start = [], 40
    for length in lengths:
        ranges.append(content[start : start + length])
        start += length
    assert start == len(content)
    nested = format_id == DOUBLE_QUANT
    weight, absmax, table, nested_absmax, nested_table, expected = ranges
    return Slice(
        quant_type,
        block_size,
        n,
        numbers(weight, torch.uint8).view(-1, 1),
        numbers(absmax, torch.uint8 if nested else torch.float32),
        numbers(table, torch.float32),
        numbers(nested_absmax, torch.float32) if nested else None,
        numbers(nested_table, torch.float32) if nested else None,
        offset if nested else None,
        numbers(expected, torch.bfloat16),
    )


def numbers(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype)


def as_packed(golden: Slice) -> PackedWeight:
    offset = None if golden.nested_offset is None else torch.tensor(golden.nested_offset)
    return PackedWeight(
        golden.packed,
        golden.absmax,
        golden.shape,
        golden.block_size,
        golden.quant_type,
        torch.bfloat16,
        golden.nested_absmax,
        offset,
    )


def assert_same_numbers(decoded: torch.Tensor, golden: Slice) -> None:
    seen, expected = decoded.reshape(-1).view(torch.int16), golden.expected.view(torch.int16)
    assert seen.numel() == golden.n_elements == expected.numel()
    differing = seen != expected
    if golden.quant_type == "fp4":  # CUDA decodes code 8 to -0.0
        differing &= ~((decoded.reshape(-1) == 0) & (golden.expected == 0))
    assert int(differing.sum()) == 0


def test_slice_decodes_to_the_numbers_of_the_cuda_kernel(golden: Slice) -> None:
    assert_same_numbers(decode(as_packed(golden)), golden)


def test_operator_decodes_slice_to_the_numbers_of_the_cuda_kernel(golden: Slice) -> None:
    assert_same_numbers(dequantize(as_packed(golden), torch.bfloat16), golden)


def test_slice_as_stored_in_safetensors_decodes_to_the_numbers_of_the_cuda_kernel(golden: Slice) -> None:
    state = {
        "quant_type": golden.quant_type,
        "blocksize": golden.block_size,
        "dtype": "bfloat16",
        "shape": list(golden.shape),
    }
    tensors = {"absmax": golden.absmax, "quant_map": golden.table}
    if golden.nested_absmax is not None:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": golden.nested_offset}
        tensors |= {"nested_absmax": golden.nested_absmax, "nested_quant_map": golden.nested_table}
    key = f"quant_state.bitsandbytes__{golden.quant_type}"
    tensors[key] = numbers(json.dumps(state).encode(), torch.uint8)
    assert_same_numbers(decode(from_bnb(golden.packed, tensors, golden.shape)), golden)


def test_tables_in_the_slice_are_ours(golden: Slice) -> None:
    assert torch.allclose(golden.table, codebook(golden.quant_type), rtol=0, atol=1e-7)
    if golden.nested_table is not None:
        assert torch.allclose(golden.nested_table, dynamic_codebook(), rtol=0, atol=1e-7)
