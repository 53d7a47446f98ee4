"""bitsandbytes' keys there and back, and every way in which a stored weight is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.guard import shown
from nybble.kernels import dequantize
from nybble.quant import BLOCK_SIZES, QUANT_TYPES, SUFFIXES, PackedWeight, decode, encode, from_bnb, to_bnb

STATE = "quant_state.bitsandbytes__nf4"
SHAPE = (24, 64)


def stored(double_quant: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    packed = encode(torch.randn(SHAPE), "nf4", 64, double_quant)
    return packed.packed, to_bnb(packed)


def as_bytes(text: str | bytes) -> Tensor:
    return torch.tensor(list(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


def read_state(tensors: dict[str, Tensor], key: str = STATE) -> dict[str, Any]:
    return json.loads(bytes(tensors[key].tolist()))


def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    return {**tensors, STATE: as_bytes(json.dumps(read_state(tensors) | changes))}


def without_state_key(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {**tensors, STATE: as_bytes(json.dumps({k: v for k, v in read_state(tensors).items() if k != key}))}


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def assert_same(ours: PackedWeight, other: PackedWeight) -> None:
    facts = ("shape", "block_size", "quant_type", "dtype", "is_nested")
    assert [getattr(ours, name) for name in facts] == [getattr(other, name) for name in facts]
    for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
        a, b = getattr(ours, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_round_trip_keeps_every_tensor_and_fact(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    for block_size in BLOCK_SIZES:
        packed = encode(torch.randn(37, 53).to(dtype), quant_type, block_size, double_quant)
        assert_same(from_bnb(packed.packed, to_bnb(packed), (37, 53)), packed)


def test_keys_are_the_known_suffixes() -> None:
    nested, plain = set(stored()[1]), set(stored(double_quant=False)[1])
    assert nested == {"absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE}
    assert plain == {"absmax", "quant_map", STATE}
    assert nested <= set(SUFFIXES)


def test_weights_share_no_memory_among_each_other() -> None:
    # Writers of safetensors refuse tensors that share memory.
    first, second = stored()[1], stored()[1]
    addresses = [tensor.data_ptr() for tensor in (*first.values(), *second.values())]
    assert len(set(addresses)) == len(addresses)


def test_shape_is_not_needed_for_reading() -> None:
    packed, tensors = stored()
    assert from_bnb(packed, tensors).shape == SHAPE


def test_codes_are_read_in_any_shape() -> None:
    packed, tensors = stored()
    for view in (packed.view(-1), packed.view(1, -1), packed.view(24, 32)):
        assert torch.equal(decode(from_bnb(view, tensors)), decode(from_bnb(packed, tensors)))


@pytest.mark.parametrize(
    "double_quant",
    [False, True],
)
def test_scales_stored_as_a_column_decode_alike(double_quant: bool) -> None:
    packed, tensors = stored(double_quant)
    column = from_bnb(packed, {**tensors, "absmax": tensors["absmax"].view(-1, 1)})
    expected = decode(from_bnb(packed, tensors))
    assert torch.equal(decode(column), expected)
    assert torch.equal(dequantize(column, torch.float32), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bitsandbytes_reads_what_is_written(quant_type: str, double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    packed = encode(torch.randn(8, 64), quant_type, 64, double_quant)
    state = bnb.QuantState.from_dict(to_bnb(packed), device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(packed.packed, state), decode(packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_what_bitsandbytes_writes_is_read_and_written_alike(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(8, 64).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
    theirs = state.as_dict(packed=True)
    read = from_bnb(codes, theirs, (8, 64))
    assert torch.equal(decode(read), bnb.dequantize_4bit(codes, state))
    written = to_bnb(read)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], theirs[name]) for name in written)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
REFUSED: dict[str, tuple[Change, str]] = {
    "no state": (lambda t: without(t, STATE), "needs exactly one .* found 0"),
    "two states": (lambda t: {**t, "quant_state.bitsandbytes__fp4": t[STATE]}, "needs exactly one .* found 2"),
    "state under another type": (
        lambda t: {**without(t, STATE), "quant_state.bitsandbytes__fp4": t[STATE]},
        "key says fp4, state says 'nf4'",
    ),
    "unknown type": (
        lambda t: {
            **without(t, STATE),
            "quant_state.bitsandbytes__int4": with_state(t, quant_type="int4")[STATE],
        },
        "quant_type must be one of",
    ),
    "state too large": (lambda t: {**t, STATE: as_bytes(" " * 4097)}, "at most 4096 uint8, got 4097"),
    "state of another dtype": (lambda t: {**t, STATE: t[STATE].int()}, "at most 4096 uint8, got .* torch.int32"),
    "state is no JSON": (lambda t: {**t, STATE: as_bytes("{'quant_type'")}, "is not JSON"),
    "state is no text": (lambda t: {**t, STATE: as_bytes(b"\xff\xfe\x00")}, "is not JSON"),
    "state is empty": (lambda t: {**t, STATE: as_bytes("")}, "is not JSON"),
    "state is a list": (lambda t: {**t, STATE: as_bytes("[1]")}, "must hold quant_type"),
    "no block size": (lambda t: without_state_key(t, "blocksize"), "must hold quant_type, blocksize"),
    "no shape": (lambda t: without_state_key(t, "shape"), "must hold quant_type, blocksize"),
    "unknown dtype": (lambda t: with_state(t, dtype="int8"), "dtype must be one of .* got 'int8'"),
    "shape is null": (lambda t: with_state(t, shape=None), "shape must be a list"),
    "shape with zero": (lambda t: with_state(t, shape=[24, 0]), "shape must be a list of positive"),
    "shape with truth values": (lambda t: with_state(t, shape=[True, 64]), "shape must be a list of positive"),
    "shape with fractions": (lambda t: with_state(t, shape=[24.0, 64]), "shape must be a list of positive"),
    "another shape": (lambda t: with_state(t, shape=[64, 24]), r"\(64, 24\) is stored, the layer has \(24, 64\)"),
    "another block size": (lambda t: with_state(t, blocksize=32), "48 blocks need"),
    "odd block size": (lambda t: with_state(t, blocksize=48), "block size must be one of"),
    "no absmax": (lambda t: without(t, "absmax"), "absmax is missing"),
    "absmax too short": (lambda t: {**t, "absmax": t["absmax"][1:]}, "24 blocks need .* got 23"),
    "absmax of another dtype": (lambda t: {**t, "absmax": t["absmax"].float()}, "torch.uint8 scales, got .*float32"),
    "no table": (lambda t: without(t, "quant_map"), "quant_map is missing"),
    "table of another size": (lambda t: {**t, "quant_map": t["quant_map"][:15]}, "quant_map holds 15 values"),
    "table of other values": (lambda t: {**t, "quant_map": t["quant_map"].flip(0)}, "quant_map holds other values"),
    "table with NaN": (lambda t: {**t, "quant_map": t["quant_map"] * float("nan")}, "quant_map holds other values"),
    "no nested scales": (lambda t: without(t, "nested_absmax"), "needs nested_absmax and a nested_offset"),
    "no nested offset": (lambda t: without_state_key(t, "nested_offset"), "needs nested_absmax and a nested_offset"),
    "no nested table": (lambda t: without(t, "nested_quant_map"), "nested_quant_map is missing"),
    "nested table of other values": (
        lambda t: {**t, "nested_quant_map": t["nested_quant_map"] * 0.5},
        "nested_quant_map holds other values",
    ),
    "another nested block size": (lambda t: with_state(t, nested_blocksize=128), "must be 256, got 128"),
    "no nested block size": (lambda t: without_state_key(t, "nested_blocksize"), "must be 256, got None"),
    "too many nested scales": (
        lambda t: {**t, "nested_absmax": torch.ones(2)},
        "24 scales need 1 float32 scales, got 2",
    ),
    "nested scales of another dtype": (
        lambda t: {**t, "nested_absmax": t["nested_absmax"].half()},
        "need 1 float32 scales, got 1 torch.float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_weight_is_refused_by_name(case: str) -> None:
    change, message = REFUSED[case]
    packed, tensors = stored()
    with pytest.raises(ValueError, match=message):
        from_bnb(packed, change(tensors), SHAPE)


# What JSON can hold in the place of a number or a name.
NONSENSE = (None, "64", "x", 0, -64, 64.5, True, [64], {"a": 1}, 10**30, 10**300)
IN_THE_STATE = [
    pytest.param(field, value, id=f"{field}={shown(value)}")
    for field in ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize")
    for value in NONSENSE
]


@pytest.mark.parametrize(("field", "value"), IN_THE_STATE)
def test_nonsense_in_the_state_raises_nothing_but_value_error(field: str, value: Any) -> None:
    packed, tensors = stored()
    with pytest.raises(ValueError) as caught:
        from_bnb(packed, with_state(tensors, **{field: value}), SHAPE)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["x", None, [64], {"a": 1}], ids=repr)
def test_nested_offset_that_is_no_number_raises_nothing_but_value_error(value: Any) -> None:
    packed, tensors = stored()
    with pytest.raises(ValueError):
        from_bnb(packed, with_state(tensors, nested_offset=value), SHAPE)


def test_state_nested_too_deep_raises_value_error() -> None:
    packed, tensors = stored()
    with pytest.raises(ValueError):
        from_bnb(packed, {**tensors, STATE: as_bytes("[" * 4096)}, SHAPE)


def test_codes_of_another_length_are_refused() -> None:
    packed, tensors = stored()
    with pytest.raises(ValueError, match="1536 weights need 768 uint8 bytes, got 767"):
        from_bnb(packed[1:], tensors, SHAPE)


def test_codes_of_another_type_are_refused() -> None:
    # bitsandbytes can store codes as bfloat16 (bnb_4bit_quant_storage), half as many numbers.
    packed, tensors = stored()
    with pytest.raises(ValueError, match=r"need 768 uint8 bytes, got 384 torch\.bfloat16"):
        from_bnb(packed.view(-1).view(torch.bfloat16), tensors, SHAPE)


def test_plain_scales_that_claim_to_be_nested_are_refused() -> None:
    packed, tensors = stored(double_quant=False)
    with pytest.raises(ValueError, match="needs nested_absmax and a nested_offset"):
        from_bnb(packed, with_state(tensors, nested_blocksize=256, nested_offset=0.0), SHAPE)


PACKED_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"quant_type": "int4"}, "quant_type must be one of"),
    "block size": ({"block_size": 48}, "block size must be one of"),
    "too few bytes": ({"packed": torch.zeros(767, 1, dtype=torch.uint8)}, "768 uint8 bytes, got 767"),
    "bytes of another type": ({"packed": torch.zeros(768, 1, dtype=torch.int8)}, "768 uint8 bytes, got 768 torch.int8"),
    "another shape": ({"shape": (24, 63)}, "1512 weights need 756"),
    "float scales with nested ones": ({"absmax": torch.ones(24)}, "as many torch.uint8 scales"),
    "offset alone": (
        {"nested_absmax": None, "absmax": torch.ones(24)},
        "nested_absmax and nested_offset go together",
    ),
    "nested scales alone": ({"nested_offset": None}, "nested_absmax and nested_offset go together"),
    "too many nested scales": ({"nested_absmax": torch.ones(2)}, "24 scales need 1 float32 scales, got 2"),
    "half nested scales": ({"nested_absmax": torch.ones(1).half()}, "got 1 torch.float16"),
}


@pytest.mark.parametrize("case", PACKED_REFUSED)
def test_packed_weight_that_does_not_add_up_is_refused(case: str) -> None:
    changes, message = PACKED_REFUSED[case]
    with pytest.raises(ValueError, match=message):
        replace(encode(torch.randn(SHAPE)), **changes)


def test_packed_weight_counts_its_bytes() -> None:
    # 512 * 512 weights: codes, 4096 scales of 8 bits, 16 of 32 bits, the offset.
    packed = encode(torch.randn(512, 512))
    assert packed.n_bytes == 512 * 512 // 2 + 4096 + 16 * 4 + 4
    assert encode(torch.randn(512, 512), double_quant=False).n_bytes == 512 * 512 // 2 + 4096 * 4


def test_packed_weight_is_immutable_and_moves_by_copy() -> None:
    packed = encode(torch.randn(SHAPE))
    moved = packed.to("meta")
    assert moved.packed.device.type == moved.absmax.device.type == moved.nested_offset.device.type == "meta"
    assert packed.packed.device.type == "cpu"
    with pytest.raises(AttributeError):
        packed.block_size = 32
