"""The native path: the reference's bits under every instruction set of this machine, whatever the shape."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from nybble.kernels import kquants, library
from nybble.kernels.attention import cpu as attention
from nybble.kernels.dispatch import Choice, Dispatcher, dispatcher
from nybble.kernels.library import MAX_ROWS
from nybble.kernels.ops4bit import cpu
from nybble.kernels.ops4bit import torch as plain
from nybble.kernels.pointwise import cpu as pointwise
from nybble.quant import BLOCK_SIZES, QUANT_TYPES, PackedWeight, codebook, decode, encode, encode_searched
from nybble.quant.search import FACTORS, NEIGHBOURS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 31, 33, 64, 35 * 53, 4160, 8193)  # odd, of less than a block, with a short last block
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


@pytest.fixture(params=range(len(library.INSTRUCTION_SETS)), ids=library.INSTRUCTION_SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        library.set_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield library.INSTRUCTION_SETS[request.param]
    library.set_instruction_set(-1)


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
def test_products_are_within_float32_of_the_exact_ones(
    shape: tuple[int, int], dtype: torch.dtype, instruction_set: str
) -> None:
    halves = dtype == torch.bfloat16 and instruction_set == "AVX512-BF16"
    for block_size, rows in product((32, 64, 1024, 4096), (*range(1, MAX_ROWS + 1), 9, 30, 128)):
        weight, x = encode(torch.randn(shape), block_size=block_size), torch.randn(rows, shape[1]).to(dtype)
        exact = x.double() @ decode(weight, torch.float32).double().t()
        magnitudes = x.double().abs() @ decode(weight, torch.float32).double().abs().t()
        product_ = cpu.multiply(x, weight)
        assert (product_.shape, product_.dtype) == (exact.shape, dtype)
        # Sums of n products in float32 lose under 4 bits here (worst seen: 1.2e-7); then one rounding to the type of x.
        # Values of weights in bfloat16 are up to .18 % off; so are decoded ones (.2 %), as more rows have them.
        lost = 2e-3 if halves or (rows > MAX_ROWS and dtype != torch.float32) else 5e-7
        assert ((product_ - exact).abs() <= lost * magnitudes + torch.finfo(dtype).eps * exact.abs()).all()
        if halves:  # and no further off than decoded weights in bfloat16 are
            decoded = x.double() @ decode(weight, dtype).double().t()
            assert (product_ - exact).norm() <= 1.5 * ((decoded - exact).norm() + exact.norm() * 2.0**-9)


@pytest.mark.parametrize("rank", [1, 8, 16, 21, 64])
@pytest.mark.parametrize("k", [64, 250, 448])
def test_adapters_and_weights_of_16_bits_are_part_of_the_product(rank: int, k: int) -> None:
    weight, dense = encode(torch.randn(75, k)), torch.randn(75, k)
    for dtype, rows in product(DTYPES, (1, 3, 8, 20)):
        a, b = torch.randn(rank, k), torch.randn(75, rank).to(dtype)
        x, adapter = torch.randn(rows, k).to(dtype), plain.LowRank(a, b, 0.3)
        for base, ours in (
            (decode(weight, torch.float32).double(), cpu.multiply(x, weight, adapter)),
            (dense.to(dtype).double(), cpu.multiply_dense(x, dense.to(dtype), adapter)),
        ):
            exact = x.double() @ (base + 0.3 * b.double() @ a.double()).t()
            # By rows of more than 8 the sum of the base is rounded before the adapter is added, and A is rounded.
            rounded = (5e-3 if rows > MAX_ROWS else 2e-3) if dtype != torch.float32 else 1e-6
            assert (ours - exact).norm() <= rounded * exact.norm() * (4 if dtype == torch.bfloat16 else 1)
        assert torch.equal(cpu.multiply(x, weight, plain.LowRank(a, 0 * b, 0.3)), cpu.multiply(x, weight))


def test_rows_and_types_that_the_loops_do_not_take_go_the_plain_way() -> None:
    weight = encode(torch.randn(6, 64))
    for x in (torch.randn(MAX_ROWS + 1, 64), torch.randn(0, 64), torch.randn(2, 64, dtype=torch.float64)):
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


def test_the_operators_take_this_backend_and_say_so() -> None:
    assert all(dispatcher.code(operator, CPU) is cpu for operator in ENGINE)
    assert {operator: dispatcher.choice(operator, CPU) for operator in ENGINE} == dict.fromkeys(
        ENGINE, Choice(cpu.NAME)
    )
    assert all(choice.reason is None for choice in dispatcher.choices(CPU).values())


def test_an_operator_runs_by_the_backend_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    dispatcher.choices(CPU)  # the self-tests, which compare with the torch backend, come before it is another
    monkeypatch.setattr(plain, "dequantize", lambda weight, out: ran.append("plain"))
    weight = encode(torch.randn(64))
    dispatcher.choose(CPU, {"dequantize_4bit": Choice("torch", "the native one is broken")})
    torch.ops.nybble.dequantize_4bit_out(
        weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset, "nf4", 64, torch.empty(64)
    )
    assert ran == ["plain"]
    choices = dispatcher.choices(CPU)
    assert choices["dequantize_4bit"] == Choice("torch", "the native one is broken")
    assert choices["gemv_4bit"] == Choice("native")
    assert [operator for operator, choice in choices.items() if choice.reason] == ["dequantize_4bit"]


def test_a_kind_of_attention_that_is_skipped_is_off_within_the_settings_alone() -> None:
    q = torch.randn(1, 2, 16, 64)

    def kernel() -> int:
        return torch._fused_sdp_choice(q, q, q, None, 0.0, True)

    assert kernel() == SDPBackend.FLASH_ATTENTION.value
    dispatcher.choose(CPU, {"sdpa": Choice("math", "flash leaks")})
    assert kernel() == SDPBackend.FLASH_ATTENTION.value
    with dispatcher.torch_settings(CPU):
        assert kernel() == SDPBackend.MATH.value
    assert kernel() == SDPBackend.FLASH_ATTENTION.value
    dispatcher.choose(CPU, {"sdpa": Choice("flash")})
    with dispatcher.torch_settings(CPU):
        assert kernel() == SDPBackend.FLASH_ATTENTION.value


def test_without_the_library_the_torch_backend_runs_and_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="was not built"):
        library.find_library(tmp_path)
    monkeypatch.setattr(library, "unavailable", lambda: "no compiler")
    assert {first_that_works(operator) for operator in ENGINE} == {("torch", "no compiler")}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int nybble_decode(void) { return 0; }", "has ABI None, this package needs ABI"),
        ("int nybble_abi(void) { return 1; }", "has ABI 1, this package needs ABI"),
        (
            f"int nybble_abi(void) {{ return {library.ABI}; }} long nybble_constant(const char *name) {{ return 7; }}",
            "has another MAX_ROWS than this package's 8",
        ),
    ],
)
def test_a_library_of_other_sources_is_refused_in_one_line(tmp_path: Path, source: str, message: str) -> None:
    if not shutil.which("gcc"):
        pytest.skip("there is no C compiler")
    file = tmp_path / f"_native{EXTENSION_SUFFIXES[0]}"
    (tmp_path / "old.c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(file), str(tmp_path / "old.c")], check=True)
    with pytest.raises(OSError, match=message) as caught:
        library.open_library(library.find_library(tmp_path))
    assert "rebuild it with: pip install" in str(caught.value)
    assert "\n" not in str(caught.value)


MIRRORS = {
    **{name: getattr(cpu, f"_{name}") for name in ("Tables", "Source", "Packed", "Nested", "Product")},
    **{name: getattr(pointwise, f"_{name}") for name in ("Norm", "Gate", "Dropout", "Loss", "Rotation")},
    "DecodeAttention": pointwise._DecodeAttention,
    "StridedHeads": attention._StridedHeads,
    "Attention": attention._Attention,
    "KQuant": kquants._KQuant,
}


@pytest.mark.parametrize("name", MIRRORS)
def test_structures_have_the_size_that_the_library_gives_them(name: str) -> None:
    assert ctypes.sizeof(MIRRORS[name]) == library.load_library().nybble_constant(f"sizeof {name}".encode())


def test_the_encoder_tries_no_more_scales_than_the_library_has_room_for() -> None:
    limits = {name: library.load_library().nybble_constant(name.encode()) for name in ("MAX_CANDIDATES", "MAX_BLOCK")}
    assert 2 * len(FACTORS) <= limits["MAX_CANDIDATES"]
    assert limits["MAX_CANDIDATES"] >= 2 * NEIGHBOURS + 1
    assert max(BLOCK_SIZES) == limits["MAX_BLOCK"]
    assert library.load_library().nybble_constant(b"nonsense") == -1


def first_that_works(operator: str) -> tuple[str, str | None]:
    choice = Dispatcher().choice(operator, CPU)
    return choice.backend, choice.reason


OPERATOR_OF = dict.fromkeys(("search_scales", "nested_codes", "nearest_codes"), "quantize_4bit") | {
    "dequantize": "dequantize_4bit",
    "multiply": "gemv_4bit",
}


@pytest.mark.parametrize("function", OPERATOR_OF)
def test_a_backend_of_other_bits_is_not_taken(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(cpu, function)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        changed = arguments[1] if function == "dequantize" else result
        changed[-1] += 1
        return result

    monkeypatch.setattr(cpu, function, wrong)
    found = {operator: first_that_works(operator) for operator in ENGINE}
    backend, reason = found.pop(OPERATOR_OF[function])
    assert backend == "torch"
    assert f"self-test of the native backend failed: {function}" in (reason or "")
    assert set(found.values()) == {("native", None)}


def test_a_backend_that_crashes_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("no C compiler to build the launcher with")

    monkeypatch.setattr(cpu, "dequantize", crash)
    backend, reason = first_that_works("dequantize_4bit")
    assert backend == "torch"
    assert "RuntimeError: no C compiler" in (reason or "")


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot run instruction set 9"):
        library.set_instruction_set(9)
