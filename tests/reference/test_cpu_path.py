"""The native path: the reference's bits under every instruction set of this machine, whatever the shape."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from nybble.kernels import choices, cpu, paths, plain
from nybble.quant import BLOCK_SIZES, QUANT_TYPES, PackedWeight, codebook, decode, encode, encode_searched

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 31, 33, 64, 35 * 53, 4160, 8193)  # odd, of less than a block, with a short last block
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture(params=range(len(cpu.INSTRUCTION_SETS)), ids=cpu.INSTRUCTION_SETS, autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    try:
        cpu.set_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield
    cpu.set_instruction_set(-1)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_decodes_as_the_reference(weight: PackedWeight) -> None:
    for dtype in DTYPES:
        out = torch.empty(weight.shape, dtype=dtype)
        cpu.dequantize(weight, out)
        assert torch.equal(bits(out), bits(decode(weight, dtype))), (weight.shape, dtype)


def assert_encodes_as_the_reference(flat: Tensor, quant_type: str, block_size: int, double_quant: bool = True) -> None:
    for signed in (True, False):
        arguments = (flat, quant_type, block_size, double_quant, signed)
        ours, theirs = encode_searched(*arguments, cpu), encode_searched(*arguments)  # type: ignore[arg-type]
        assert torch.equal(bits(ours.absmax), bits(theirs.absmax)), (flat.shape, flat.dtype, signed)
        assert torch.equal(ours.packed, theirs.packed), (flat.shape, flat.dtype, signed)


def any_floats(n: int, seed: int = 0) -> Tensor:
    """Every exponent and sign, subnormal numbers among them, `(n,) float32`, finite."""
    drawn = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    values = drawn.view(torch.float32)
    return torch.where(values.isfinite(), values, torch.ones(()))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_decoded_numbers_have_the_bits_of_the_reference(quant_type: str, block_size: int) -> None:
    for size, double_quant in product(SIZES, (False, True)):
        assert_decodes_as_the_reference(encode(torch.randn(size), quant_type, block_size, double_quant))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_scales_of_any_size_and_sign_decode_and_round_as_in_the_reference(quant_type: str) -> None:
    packed = torch.randint(0, 256, (32 * 5000, 1), dtype=torch.uint8)
    assert_decodes_as_the_reference(PackedWeight(packed, any_floats(5000), (320_000,), 64, quant_type, torch.float32))
    halves = torch.rand(5000) * 2.0 ** torch.randint(-30, 18, (5000,))  # around the range of float16
    assert_decodes_as_the_reference(PackedWeight(packed, halves, (320_000,), 64, quant_type, torch.float32))


def test_scales_that_are_not_numbers_stay_what_they_are() -> None:
    packed, scales = torch.full((64, 1), 0xF0, dtype=torch.uint8), torch.tensor([torch.inf, torch.nan, -torch.inf, 1.0])
    weight = PackedWeight(packed, scales, (128,), 32, "nf4", torch.float32)
    for dtype in DTYPES:
        out = torch.empty(128, dtype=dtype)
        cpu.dequantize(weight, out)
        assert torch.equal(out.nan_to_num(7.0), decode(weight, dtype).nan_to_num(7.0))


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_encoded_bytes_are_those_of_the_reference(quant_type: str, block_size: int) -> None:
    for size, dtype, double_quant in product(SIZES, DTYPES, (False, True)):
        assert_encodes_as_the_reference(torch.randn(size).to(dtype), quant_type, block_size, double_quant)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_midpoints_zeros_and_extremes_encode_as_in_the_reference(quant_type: str) -> None:
    values = codebook(quant_type).sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    around = torch.cat([midpoints, midpoints.nextafter(torch.ones(())), midpoints.nextafter(-torch.ones(())), values])
    blocks = [torch.zeros(64), -torch.zeros(64), torch.nn.functional.pad(around, (0, -len(around) % 64))]
    blocks += [torch.rand(64) * 2e-38, torch.rand(64) * 1e-42, torch.randn(64) * 1e18, torch.randn(64) * 1e38]
    flat = torch.cat(blocks)
    flat = torch.where(flat.isfinite(), flat, torch.ones(()))
    assert_encodes_as_the_reference(flat, quant_type, 64, double_quant=False)
    assert_encodes_as_the_reference(flat[:-128], quant_type, 64)
    assert_encodes_as_the_reference(any_floats(64 * 300), quant_type, 64, double_quant=False)
    scales = torch.cat([values, any_floats(300)])
    given = torch.cat([around.repeat(16), any_floats(64 * len(scales), seed=1)])[: 64 * len(scales)]
    arguments = (given, quant_type, 64, scales)
    assert torch.equal(cpu.nearest_codes(*arguments), plain.nearest_codes(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_as_it_is(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = torch.where(every.isfinite(), every, torch.zeros((), dtype=dtype))
    spread = every.view(32, -1).t().reshape(-1)  # blocks of all sizes
    for flat in (every, spread):
        ours, theirs = (path.search_scales(flat, "nf4", 32, True) for path in (cpu, plain))
        assert torch.equal(bits(ours), bits(theirs))


def test_memory_may_start_anywhere_and_lie_in_strides() -> None:
    for offset, dtype in product((1, 3), DTYPES):
        flat = torch.randn(1000 + offset).to(dtype)[offset:]
        assert_encodes_as_the_reference(flat, "nf4", 64)
        assert_encodes_as_the_reference(torch.randn(64, 70).to(dtype).t(), "nf4", 64)
        weight = encode(flat)
        packed = torch.cat([weight.packed.new_zeros(offset, 1), weight.packed])[offset:]
        moved = PackedWeight(
            packed, weight.absmax, weight.shape, 64, "nf4", dtype, weight.nested_absmax, weight.nested_offset
        )
        out = torch.full((1000 + 2 * offset,), 5.0, dtype=dtype)
        cpu.dequantize(moved, out[offset:-offset])
        assert torch.equal(bits(out[offset:-offset]), bits(decode(weight, dtype)))
        assert (out[:offset] == 5.0).all()  # nothing beside the result is written
        assert (out[-offset:] == 5.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (33, 1000), (5, 37), (64, 4096), (9, 8256), (91, 192)], ids=str)
def test_products_are_within_float32_of_the_exact_ones(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for block_size, rows in product((32, 64, 1024, 4096), range(1, cpu.MAX_ROWS + 1)):
        weight, x = encode(torch.randn(shape), block_size=block_size), torch.randn(rows, shape[1]).to(dtype)
        exact = x.double() @ decode(weight, torch.float32).double().t()
        magnitudes = x.double().abs() @ decode(weight, torch.float32).double().abs().t()
        product_ = cpu.multiply(x, weight)
        assert (product_.shape, product_.dtype) == (exact.shape, dtype)
        # Sums of n products in float32 lose under 4 bits here (worst seen: 1.2e-7); then one rounding to the type of x.
        # Values of weights in bfloat16 are up to .18 % off.
        halves = dtype == torch.bfloat16 and cpu.instruction_set() == "AVX512-BF16"
        lost = 2e-3 if halves else 5e-7
        assert ((product_ - exact).abs() <= lost * magnitudes + torch.finfo(dtype).eps * exact.abs()).all()
        if halves:  # and no further off than decoded weights in bfloat16 are
            decoded = x.double() @ decode(weight, dtype).double().t()
            assert (product_ - exact).norm() <= 1.5 * ((decoded - exact).norm() + exact.norm() * 2.0**-9)


def test_rows_and_types_that_the_loops_do_not_take_go_the_plain_way() -> None:
    weight = encode(torch.randn(6, 64))
    for x in (torch.randn(cpu.MAX_ROWS + 1, 64), torch.randn(0, 64), torch.randn(2, 64, dtype=torch.float64)):
        assert torch.equal(cpu.multiply(x, weight), plain.multiply(x, weight))


def test_threads_make_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, x = torch.randn(64 * 1001 + 17), torch.randn(3, 320)
    for name in ("_MOVED", "_TRIED"):
        monkeypatch.setattr(cpu, name, 64)
    square = encode(torch.randn(41, 320))
    alone = cpu.multiply(x, square)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_encodes_as_the_reference(flat, "nf4", 64)
    assert_decodes_as_the_reference(encode(flat))
    assert torch.equal(cpu.multiply(x, square), alone)


ENGINE = ("dequantize_4bit", "gemv_4bit", "quantize_4bit")


def test_the_operators_take_this_path_and_say_so() -> None:
    assert all(paths.path_for(CPU, operator) is cpu for operator in ENGINE)  # type: ignore[comparison-overlap]
    assert {operator: paths.paths_taken(CPU)[operator] for operator in ENGINE} == dict.fromkeys(ENGINE, cpu.NAME)
    assert paths.path_reasons(CPU) == {}


def test_an_operator_runs_by_the_path_that_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    paths.paths_taken(CPU)  # the self-tests, which compare with the plain path, come before it is another
    monkeypatch.setattr(plain, "dequantize", lambda weight, out: ran.append("plain"))
    weight = encode(torch.randn(64))
    choices.take(CPU, {"dequantize_4bit": choices.Choice("torch", "the native one is broken")})
    torch.ops.nybble.dequantize_4bit_out(
        weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset, "nf4", 64, torch.empty(64)
    )
    assert ran == ["plain"]
    assert paths.paths_taken(CPU)["dequantize_4bit"] == "torch"
    assert paths.paths_taken(CPU)["gemv_4bit"] == "native"
    assert paths.path_reasons(CPU) == {"dequantize_4bit": "the native one is broken"}


def test_a_kind_of_attention_that_is_skipped_is_switched_off() -> None:
    q = torch.randn(1, 2, 16, 64)
    assert torch._fused_sdp_choice(q, q, q, None, 0.0, True) == SDPBackend.FLASH_ATTENTION.value
    try:
        choices.take(CPU, {"sdpa": choices.Choice("math", "flash leaks")})
        assert torch._fused_sdp_choice(q, q, q, None, 0.0, True) == SDPBackend.MATH.value
    finally:
        choices.take(CPU, {"sdpa": choices.Choice("flash")})
    assert torch._fused_sdp_choice(q, q, q, None, 0.0, True) == SDPBackend.FLASH_ATTENTION.value


def test_without_the_library_the_plain_path_runs_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "EXTENSION_SUFFIXES", [".absent"])
    with pytest.raises(OSError, match="was not built"):
        cpu.load_library.__wrapped__()
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler")
    assert {first_that_works(operator) for operator in ENGINE} == {("torch", "no compiler")}


def first_that_works(operator: str) -> tuple[str, str | None]:
    chosen = paths._first_that_works.__wrapped__(operator, "cpu")
    return chosen.path, chosen.reason


OPERATOR_OF = dict.fromkeys(("search_scales", "nested_codes", "nearest_codes"), "quantize_4bit") | {
    "dequantize": "dequantize_4bit",
    "multiply": "gemv_4bit",
}


@pytest.mark.parametrize("function", OPERATOR_OF)
def test_a_path_of_other_bits_is_not_taken(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(cpu, function)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        changed = arguments[1] if function == "dequantize" else result
        changed[-1] += 1
        return result

    monkeypatch.setattr(cpu, function, wrong)
    found = {operator: first_that_works(operator) for operator in ENGINE}
    path, reason = found.pop(OPERATOR_OF[function])
    assert path == "torch"
    assert f"self-test of the native path failed: {function}" in (reason or "")
    assert set(found.values()) == {("native", None)}


def test_a_path_that_crashes_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("no C compiler to build the launcher with")

    monkeypatch.setattr(cpu, "dequantize", crash)
    path, reason = first_that_works("dequantize_4bit")
    assert path == "torch"
    assert "RuntimeError: no C compiler" in (reason or "")


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot run instruction set 9"):
        cpu.set_instruction_set(9)
