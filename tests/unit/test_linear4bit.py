"""The 4-bit linear: a plain linear over the decoded weight, in both directions, that keeps nothing and saves well."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from nybble.kernels import dispatcher
from nybble.nn import Linear4bit
from nybble.nn.workspace import workspace
from nybble.quant import QUANT_TYPES, SUFFIXES, PackedWeight, decode, encode

N_IN, N_OUT = 96, 40


def packed_layer(
    compute_dtype: torch.dtype = torch.float32,
    bias: bool = True,
    double_quant: bool = True,
    quant_type: str = "nf4",
    block_size: int = 64,
) -> Linear4bit:
    layer = Linear4bit(N_IN, N_OUT, bias, compute_dtype=compute_dtype)
    layer.set_packed(encode(torch.randn(N_OUT, N_IN), quant_type, block_size, double_quant))
    if bias:
        layer.bias = nn.Parameter(torch.randn(N_OUT))
    return layer


def plain_linear(layer: Linear4bit) -> nn.Linear:
    plain = nn.Linear(N_IN, N_OUT, layer.bias is not None)
    plain.weight = nn.Parameter(decode(layer.packed, layer.compute_dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(layer.compute_dtype))
    return plain


@pytest.mark.parametrize("shape", [(N_IN,), (3, N_IN), (2, 5, N_IN), (0, N_IN)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_both_directions_equal_a_plain_linear_over_the_decoded_weight(
    quant_type: str, double_quant: bool, bias: bool, shape: tuple[int, ...]
) -> None:
    layer = packed_layer(bias=bias, double_quant=double_quant, quant_type=quant_type)
    plain = plain_linear(layer)
    x, x_plain = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    y, y_plain = layer(x), plain(x_plain)
    torch.testing.assert_close(y, y_plain, rtol=1e-6, atol=1e-5)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_plain.backward(grad)
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-6, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_input_gradient_agrees_with_finite_differences(bias: bool) -> None:
    layer = packed_layer(torch.float64, bias=bias)
    x = torch.randn(3, N_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_block_size_is_kept(block_size: int) -> None:
    layer = packed_layer(block_size=block_size)
    assert layer.packed.block_size == block_size
    assert torch.equal(layer.dequantize(), decode(layer.packed))


def test_weight_is_bytes_and_never_gets_a_gradient() -> None:
    layer = packed_layer()
    x = torch.randn(3, N_IN, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.dtype == torch.uint8
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None
    assert x.grad is not None


def test_input_without_gradient_makes_no_graph() -> None:
    assert not packed_layer(bias=False)(torch.randn(3, N_IN)).requires_grad


def test_forward_saves_no_tensor_for_backward() -> None:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    layer = packed_layer()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, N_IN, requires_grad=True)).sum().backward()
    assert saved == []


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradient_have_the_type_of_the_input(given: torch.dtype, compute: torch.dtype) -> None:
    layer = packed_layer(compute)
    x = torch.randn(3, N_IN).to(given).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == given
    expected = plain_linear(layer)(x.detach().to(compute)).to(given)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-2 if compute == torch.bfloat16 else 1e-3, atol=1e-2)


def test_autocast_changes_neither_output_nor_gradient() -> None:
    layer = packed_layer(torch.float32)
    results = []
    for enabled in (False, True):
        x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    (y, grad), (y_autocast, grad_autocast) = results
    assert torch.equal(y, y_autocast)
    assert torch.equal(grad, grad_autocast)


def test_backward_within_autocast_computes_in_the_compute_type() -> None:
    layer = packed_layer(torch.float32, bias=False)
    x = torch.randn(3, N_IN, requires_grad=True)
    grad = torch.randn(3, N_OUT)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ decode(layer.packed, torch.float32), rtol=1e-6, atol=1e-5)


def test_gradient_passes_through_checkpointing() -> None:
    layer = packed_layer()
    x, x_again = (torch.randn(3, N_IN, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    torch.utils.checkpoint.checkpoint(layer, x_again, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, x_again.grad)


@pytest.mark.parametrize(
    "bias",
    [False, True],
)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_state_dict_round_trip_into_a_fresh_layer(quant_type: str, double_quant: bool, bias: bool) -> None:
    layer = packed_layer(bias=bias, double_quant=double_quant, quant_type=quant_type, block_size=128)
    fresh = Linear4bit(N_IN, N_OUT, bias, compute_dtype=torch.float32)
    result = fresh.load_state_dict(layer.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert (fresh.quant_type, fresh.block_size) == (quant_type, 128)
    x = torch.randn(3, N_IN)
    assert torch.equal(fresh(x), layer(x))


def test_state_dict_round_trip_within_a_model() -> None:
    model, fresh = (nn.Sequential(packed_layer(bias=False), nn.ReLU(), nn.Linear(N_OUT, 2)) for _ in range(2))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(3, N_IN)
    assert torch.equal(fresh(x), model(x))


def test_state_dict_carries_the_keys_of_bitsandbytes() -> None:
    keys = set(packed_layer().state_dict(prefix="layer."))
    nf4 = {suffix for suffix in SUFFIXES if not suffix.endswith("fp4")}
    assert keys == {"layer.weight", "layer.bias", *(f"layer.weight.{suffix}" for suffix in nf4)}


def test_state_dict_equals_that_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain = nn.Linear(N_IN, N_OUT)
    theirs = bnb.nn.Linear4bit(N_IN, N_OUT, quant_type="nf4")
    theirs.load_state_dict(plain.state_dict())
    expected = theirs.to("cpu").state_dict()
    layer = Linear4bit(N_IN, N_OUT)
    layer.set_packed(encode(plain.weight))
    layer.bias = nn.Parameter(plain.bias.detach())
    state = layer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_weight_of_another_shape_is_refused() -> None:
    layer = Linear4bit(N_IN, N_OUT)
    with pytest.raises(ValueError, match=r"shape \(96, 40\) does not fit the layer's \(40, 96\)"):
        layer.set_packed(encode(torch.randn(N_IN, N_OUT)))
    assert not layer.is_packed


def test_state_dict_of_another_shape_is_refused() -> None:
    state = packed_layer(bias=False).state_dict()
    with pytest.raises((ValueError, RuntimeError), match="is stored, the layer has"):
        Linear4bit(N_OUT, N_IN, False).load_state_dict(state)


def test_bytes_without_their_scales_are_refused() -> None:
    layer = packed_layer(bias=False)
    with pytest.raises((RuntimeError, ValueError)):
        layer.load_state_dict({"weight": torch.zeros_like(layer.weight)})


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_of_the_module_leaves_the_weight_as_it_is(dtype: torch.dtype, double_quant: bool) -> None:
    layer = packed_layer(bias=False, double_quant=double_quant)
    before = decode(layer.packed, torch.float32)
    layer.to(dtype)
    assert torch.equal(decode(layer.packed, torch.float32), before)


def test_move_of_the_module_takes_the_scales_along() -> None:
    layer = packed_layer().to("meta")
    tensors = (layer.weight, layer.absmax, layer.nested_absmax, layer.nested_offset)
    assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])  # noqa: S301
def test_copy_is_equal_and_shares_no_memory(duplicate) -> None:
    layer = packed_layer()
    x = torch.randn(3, N_IN)
    expected = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), expected)
    layer.weight.data.zero_()
    layer.absmax.zero_()
    assert torch.equal(other(x), expected)


def test_taking_over_a_weight_copies_nothing() -> None:
    packed = encode(torch.randn(N_OUT, N_IN))
    layer = Linear4bit(N_IN, N_OUT)
    layer.set_packed(packed)
    assert layer.weight.data_ptr() == packed.packed.data_ptr()
    assert layer.absmax.data_ptr() == packed.absmax.data_ptr()


def test_fresh_layer_is_an_empty_shell() -> None:
    layer = Linear4bit(N_IN, N_OUT)
    assert not layer.is_packed
    assert layer.weight.is_meta
    assert isinstance(layer, nn.Linear)  # PEFT and others look for linears


def test_description_names_the_format() -> None:
    described = repr(packed_layer())
    assert f"in_features={N_IN}, out_features={N_OUT}" in described
    assert "nf4" in described
    assert "64" in described


def test_layers_share_memory_for_decoding_and_still_differentiate_rightly() -> None:
    torch.manual_seed(0)
    first, second = (Linear4bit(64, 64, bias=False, compute_dtype=torch.float32) for _ in range(2))
    for layer in (first, second):
        layer.set_packed(encode(torch.randn(64, 64)))
    x = torch.randn(9, 64, requires_grad=True)
    second(first(x).tanh()).sum().backward()
    y = x.detach().clone().requires_grad_()
    ((y @ first.dequantize().t()).tanh() @ second.dequantize().t()).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (2, 2, 64), (0, 64)], ids=str)
def test_a_few_rows_without_gradients_give_the_same_product(shape: tuple[int, ...], bias: bool) -> None:
    layer = Linear4bit(64, 48, bias=bias, compute_dtype=torch.float32)
    layer.set_packed(encode(torch.randn(48, 64)))
    x = torch.randn(shape)
    with torch.no_grad():
        few = layer(x)
    torch.testing.assert_close(few, layer(x.requires_grad_()).detach(), rtol=1e-4, atol=1e-4)


def test_the_packed_weight_travels_whole_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in generation the backend is given one and the same value, product after product."""
    seen: list[PackedWeight] = []
    layer = packed_layer()
    x = torch.randn(12, N_IN, requires_grad=True)
    for operator, function in (("dequantize_4bit", "dequantize"), ("gemv_4bit", "multiply")):
        code = dispatcher.code(operator, torch.device("cpu"))
        right = getattr(code, function)

        def recording(*arguments: Any, right: Any = right) -> Any:
            seen.extend(a for a in arguments if isinstance(a, PackedWeight))
            return right(*arguments)

        monkeypatch.setattr(code, function, recording)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
        layer(x[:1])
    assert len(seen) == 4
    assert all(weight is seen[0] for weight in seen)


def test_memory_of_a_decoded_weight_that_is_taken_again_is_noticed() -> None:
    layer = packed_layer()
    (_, first), *_ = layer.decoded(torch.float32)
    assert torch.equal(first, decode(layer.packed, torch.float32))
    lent = layer.decoded(torch.float32)
    next(lent)
    workspace.take((2, 2), torch.empty(0), torch.float32)
    with pytest.raises(RuntimeError, match="its memory was taken for something else"):
        next(lent)
