"""The pointwise operators: every backend against formulas in float64, gradients against autograd's, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nybble.kernels import dispatcher, library
from nybble.kernels.dispatch import Choice, Dispatcher
from nybble.kernels.pointwise import cpu as native
from nybble.kernels.pointwise import ops, self_test
from nybble.kernels.pointwise import torch as reference
from nybble.kernels.pointwise.backend import PointwiseBackend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (3, 7), (5, 33), (1, 1000), (2, 4099), (9, 257))
CPU = torch.device("cpu")
ACTIVATIONS = ("silu", "gelu_tanh")
# |result - exact| / |exact| in float64, 528 results a type of the norms, gates and rotations here on the CPU's paths, 2
# shared cores of an AMD EPYC, 2026-11-23: dtype -> mean, standard deviation. Allowed are 8 deviations above the mean.
ERRORS = {torch.float32: (4.7e-8, 2.4e-8), torch.float16: (2.0e-4, 6.5e-5), torch.bfloat16: (1.6e-3, 5.2e-4)}


class Interpreted:
    """The Triton path where Triton interprets, in a process of its own."""

    NAME = "triton"

    def __init__(self, interpreter: Callable[..., tuple[Any, tuple[Any, ...]]]) -> None:
        self.interpreter = interpreter

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result, after = self.interpreter("pointwise.triton", name, *arguments)
            for before, changed in zip(arguments, after, strict=True):
                if isinstance(before, Tensor):
                    before.copy_(changed)
            return result

        return call


@pytest.fixture(params=["torch", *library.INSTRUCTION_SETS, "triton"])
def path(request: pytest.FixtureRequest) -> Iterator[PointwiseBackend]:
    if request.param == "torch":
        yield reference
    elif request.param == "triton":
        if find_spec("triton") is None:
            pytest.skip("triton is not installed")
        yield cast(PointwiseBackend, Interpreted(request.getfixturevalue("interpreter")))
    else:
        if library.unavailable():
            pytest.skip(str(library.unavailable()))
        try:
            library.set_instruction_set(library.INSTRUCTION_SETS.index(request.param))
        except ValueError as error:
            pytest.skip(str(error))
        yield native
        library.set_instruction_set(-1)


def cases(path: PointwiseBackend) -> Iterator[tuple[tuple[int, int], torch.dtype]]:
    """Shapes and types; Triton's interpreter is slow and gets half of them."""
    return iter(product(SHAPES[::2] if path.NAME == "triton" else SHAPES, DTYPES))


def assert_near(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of dtype, in the norm."""
    mean, deviation = ERRORS[dtype]
    distance, size = (result.double() - exact).norm(), exact.norm()
    assert distance <= (mean + 8 * deviation) * size + 1e-30, (tuple(exact.shape), dtype, distance / size)


def exact_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * (1 + weight if unit_offset else weight)


def exact_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    active = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    return active * up


def exact_loss(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    return functional.cross_entropy(capped, labels, reduction="none")


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As complex numbers: pair j of a head is one, turned by an angle of its own."""
    half = cos.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = turned * torch.complex(cos[:, None, :half], sin[:, None, :half])
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def gradients(function: Callable[..., Tensor], grad: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Autograd's in float64; grad of the result, ones by default."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    return torch.autograd.grad(result, leaves, torch.ones_like(result) if grad is None else grad.double())


@pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "1 + weight"])
def test_norms_and_their_gradients_are_those_of_the_formula(path: PointwiseBackend, unit_offset: bool) -> None:
    for shape, dtype in cases(path):
        x, grad, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
        for kind in (dtype, torch.float32):
            held = weight.to(kind)
            normed, rstd = path.rms_norm(x, held, 1e-2, unit_offset)
            assert (normed.dtype, rstd.dtype, rstd.shape) == (dtype, torch.float32, shape[:1])
            assert_near(normed, exact_norm(x.double(), held.double(), 1e-2, unit_offset), dtype)
            exact = torch.rsqrt(x.double().square().mean(-1) + 1e-2)
            assert ((rstd - exact).abs() <= 1e-6 * exact).all()  # worst seen: 4.4e-7, of 4,099 numbers in plain C
            given = path.rms_norm_backward(grad, x, held, rstd, unit_offset)
            (wanted,) = gradients(lambda x, w=held: exact_norm(x, w.double(), 1e-2, unit_offset), grad, x)
            assert given.dtype == dtype
            if shape[1] > 1:  # of one number only the sign is left, and nearly all of the gradient cancels
                assert_near(given, wanted, dtype)


def test_llama_rounds_the_normalised_row_and_gemma_does_not(path: PointwiseBackend) -> None:
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    llama = ((x.float() * rstd).bfloat16().float() * weight.float()).bfloat16()
    gemma = (x.float() * rstd * (1 + weight.float())).bfloat16()
    for unit_offset, wanted in ((False, llama), (True, gemma)):
        same = path.rms_norm(x, weight, 1e-6, unit_offset)[0] == wanted
        assert same.float().mean() > 0.999  # rstd may differ in its last place


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_and_their_gradients_are_those_of_the_formula(path: PointwiseBackend, activation: str) -> None:
    for shape, dtype in cases(path):
        gate, up, grad = (torch.randn(shape).to(dtype) for _ in range(3))
        exact = exact_gated(gate.double(), up.double(), activation)
        assert_near(path.gated(gate, up, activation), exact, dtype)
        wanted = gradients(lambda g, u: exact_gated(g, u, activation), grad, gate, up)
        path.gated_backward_(grad, gate, up, activation)
        for given, expected in zip((grad, gate, up), (exact, *wanted), strict=True):
            assert_near(given, expected, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_are_right_to_the_last_places_for_any_size(path: PointwiseBackend, activation: str) -> None:
    sizes = torch.logspace(-30, 4, 20_001, dtype=torch.float64).float()
    gate = torch.cat([sizes, -sizes, torch.linspace(-9, 9, 9_999), torch.zeros(1)])[None]
    wide = gate.double()
    inner = wide if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    exact = wide * torch.sigmoid(inner)  # 1 + tanh would cancel on the far left
    result = path.gated(gate, torch.ones_like(gate), activation)
    if path.NAME == "torch" and activation == "gelu_tanh":  # as it does here
        assert ((result - exact).abs() <= 1e-6 * wide.abs().clamp(max=1)).all()
        return
    # GELU's argument is rounded, and the relative error of e^x is the absolute one of x. Seen: 2.9, 200 at x = -9.
    places = 4 + (4 * inner.abs() if activation != "silu" else 0)
    assert ((result - exact).abs() <= places * 2**-24 * exact.abs() + 1e-36).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0, 30.0])
def test_losses_and_their_gradients_are_those_of_the_formula(path: PointwiseBackend, softcap: float) -> None:
    for (n, width), dtype in cases(path):
        logits, labels = (4 * torch.randn(n, width)).to(dtype), torch.randint(0, width, (n,))
        labels[0], labels[-1] = 0, width - 1
        exact = exact_loss(logits.double(), labels, softcap)
        (wanted,) = gradients(lambda x, to=labels: exact_loss(x, to, softcap), None, logits)
        losses = path.cross_entropy_(logits, labels, softcap)
        assert (losses.shape, losses.dtype) == ((n,), torch.float32)
        assert ((losses - exact).abs() <= 2e-6 * (1 + exact)).all()
        assert ((logits.double() - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-6).all()


def test_losses_of_extreme_logits_are_finite_and_right(path: PointwiseBackend) -> None:
    rows_ = [[1e4, -1e4, 0.0], [3e4, 3e4, -3e4], [-5e4, -6e4, -5e4], [-math.inf, 1.0, 2.0], [1e-30, 0.0, -1e-30]]
    logits, labels = torch.tensor(rows_), torch.tensor([1, 0, 2, 1, 0])
    exact = exact_loss(logits.double(), labels, 0.0)
    (wanted,) = gradients(lambda x: exact_loss(x, labels, 0.0), None, logits)
    losses = path.cross_entropy_(logits, labels, 0.0)
    assert ((losses - exact).abs() <= 2e-6 * (1 + exact)).all()
    assert ((logits - wanted).abs() <= 1e-6).all()


def test_numbers_that_are_none_are_not_hidden(path: PointwiseBackend) -> None:
    for dtype in DTYPES:
        x = torch.zeros(2, 40, dtype=dtype)
        x[0, 37] = torch.nan
        ones = torch.ones_like(x)
        assert path.rms_norm(x, ones[0], 1e-6, False)[0].isnan().all(dim=1).tolist() == [True, False]
        assert path.gated(x, ones, "silu").isnan().sum() == 1
        assert path.rope(x.view(2, 1, 40), ones, ones, False).isnan().sum() == 2
        kept = torch.empty_like(x)
        path.dropout(x, 0.0, 0, kept)
        assert kept.isnan().sum() == 1
        assert path.cross_entropy_(x, torch.zeros(2, dtype=torch.int64), 0.0).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("heads", "width", "rotated"), [(1, 2, 2), (3, 40, 26), (4, 64, 64), (2, 128, 32), (5, 33, 10)]
)
def test_positions_turn_as_complex_numbers_and_back(
    path: PointwiseBackend, heads: int, width: int, rotated: int
) -> None:
    for n, dtype in product((1, 6), DTYPES):
        angles = 100 * torch.rand(n, rotated // 2).repeat(1, 2)
        x = torch.randn(n, heads, width).to(dtype)
        for kind in (dtype, torch.float32):
            cos, sin = angles.cos().to(kind), angles.sin().to(kind)
            exact = exact_rope(x.double(), cos.double(), sin.double())
            turned = path.rope(x, cos, sin, False)
            assert_near(turned, exact, dtype)
            assert torch.equal(turned[..., rotated:], x[..., rotated:])
            (wanted,) = gradients(lambda x, c=cos, s=sin: exact_rope(x, c.double(), s.double()), turned, x)
            assert_near(path.rope(turned, cos, sin, True), wanted, dtype)
            apart = x.transpose(0, 1).contiguous().transpose(0, 1)
            assert torch.equal(path.rope(apart, cos, sin, False), turned)


def test_each_half_of_the_tables_is_read(path: PointwiseBackend) -> None:
    x, cos, sin = torch.randn(3, 2, 20), torch.randn(3, 12), torch.randn(3, 12)
    for inverse in (False, True):
        wanted = reference.rope(x.double(), cos, sin, inverse)
        assert_near(path.rope(x, cos, sin, inverse), wanted, torch.float32)


@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "width"), [(1, 1, 1, 1), (4, 2, 33, 64), (6, 2, 16, 20)])
def test_one_token_attends_to_the_cached_ones(
    path: PointwiseBackend, heads: int, kv_heads: int, tokens: int, width: int
) -> None:
    for dtype in DTYPES:
        q = torch.randn(3, heads, width).to(dtype)
        k, v = torch.randn(2, 3, tokens, kv_heads, width).to(dtype).transpose(2, 3).unbind()  # heads apart
        if path.NAME == "triton":  # torch's own attention there: nothing of ours to interpret
            continue
        grouped = q.double().view(3, kv_heads, -1, width)
        shares = torch.softmax(grouped @ k.double().transpose(2, 3) * 0.3, dim=-1)
        exact = (shares @ v.double()).view(3, heads, width)
        turned = v.transpose(2, 3).contiguous().transpose(2, 3)
        for result in (path.decode_attention(q, k, v, 0.3), path.decode_attention(q, k.contiguous(), turned, 0.3)):
            # Softmax and sums in float32 (worst seen: 3e-7), and one rounding.
            assert (result - exact).norm() <= max(1e-6, torch.finfo(dtype).eps / 2) * exact.norm()
        large = path.decode_attention(30 * q, 30 * k, v, 1.0)
        assert large.isfinite().all()


def test_dropout_has_the_same_bits_on_every_path(path: PointwiseBackend) -> None:
    for shape, dtype in cases(path):
        for p, seed in ((0.0, 0), (0.1, 1), (0.1, -1), (0.5, 2**31), (0.999, 2**63 - 1)):
            x, total, ours = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.empty(shape, dtype=dtype)
            theirs, sum_ = torch.empty_like(ours), total.clone()
            path.dropout(x, p, seed, ours)
            reference.dropout(x, p, seed, theirs)
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
            path.dropout_add_(total, x, p, seed)
            reference.dropout_add_(sum_, x, p, seed)
            assert torch.equal(total.view(torch.uint8), sum_.view(torch.uint8))


def test_dropout_keeps_its_share_and_each_seed_and_row_draws_by_itself() -> None:
    n, p = 1_000_000, 0.1
    drawn = []
    for seed in (0, 1, 2, 0x9E3779B1):
        out = torch.empty(1000, 1000)
        reference.dropout(torch.ones(1000, 1000), p, seed, out)
        assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
        drawn.append((out == 0).double())
        deviation = math.sqrt(p * (1 - p) / n)
        assert abs(drawn[-1].mean() - p) < 5 * deviation, seed
        by_row = drawn[-1].mean(1)
        assert 0.8 < by_row.var() / (p * (1 - p) / 1000) < 1.2  # as a binomial's; 4 deviations of 1,000 rows
        for near in (drawn[-1][:, 1:] * drawn[-1][:, :-1], drawn[-1][1:] * drawn[-1][:-1]):
            assert abs(near.mean() - p * p) < 5 * p / math.sqrt(n), seed
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((drawn[i] * drawn[j]).mean() - p * p) < 5 * p / math.sqrt(n), (i, j)


def test_threads_make_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.unavailable():
        pytest.skip(str(library.unavailable()))

    def everything() -> list[Tensor]:
        return [result for dtype in DTYPES for _, result in self_test.results(native, dtype, CPU)]

    alone = everything()
    monkeypatch.setattr(native, "_MOVED", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, three in zip(alone, everything(), strict=True):
        assert torch.equal(one, three)


OPERANDS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]] = {
    "rms_norm": lambda x, y, z: (x, y[0], 1e-6, False),
    "rms_norm_backward": lambda x, y, z: (x, y, z[0], torch.rand(x.shape[0]), True),
    "gated": lambda x, y, z: (x, y, "silu"),
    "gated_backward_": lambda x, y, z: (x, y, z, "gelu_tanh"),
    "dropout": lambda x, y, z: (x, 0.1, 3, y),
    "dropout_add_": lambda x, y, z: (x, y, 0.1, 3),
    "cross_entropy_": lambda x, y, z: (x, torch.tensor([3, 0, 1]), 5.0),
    "rope": lambda x, y, z: (x.view(3, 2, 6), y[:, :4].contiguous(), z[:, :4].contiguous(), True),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_schema_fake_and_mutations_are_what_they_say(name: str) -> None:
    operator = getattr(torch.ops.nybble, name).default
    for dtype in DTYPES:
        torch.library.opcheck(operator, OPERANDS[name](*torch.randn(3, 3, 12).to(dtype)))
    apart = torch.randn(3, 12, 3).transpose(1, 2).unbind()
    if name != "rope":
        torch.library.opcheck(operator, OPERANDS[name](*apart))
    torch.library.opcheck(
        torch.ops.nybble.rope.default, (torch.randn(2, 3, 8).transpose(0, 1), *torch.rand(2, 3, 8), False)
    )


@pytest.mark.parametrize("name", OPERANDS)
def test_what_the_fast_paths_do_not_take_goes_the_plain_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_operator: str, _device: torch.device) -> None:
        raise AssertionError("a fast path was asked for")

    x = torch.randn(3, 3, 12)
    monkeypatch.setattr(dispatcher, "code", refused)
    with pytest.raises(AssertionError, match="a fast path"):
        getattr(ops, name)(*OPERANDS[name](*x))
    for operands in (x.double(), torch.randn(3, 12, 3).transpose(1, 2)[:, :, :]):
        if name == "rope" and operands.dtype == torch.float32:
            continue  # takes strides
        getattr(ops, name)(*OPERANDS[name](*operands))
    getattr(ops, name)(*OPERANDS[name](*x.double()))


def test_labels_outside_the_logits_are_refused() -> None:
    for label in (-100, 5):
        with pytest.raises((IndexError, RuntimeError), match=r"labels must be in|out of bounds"):
            ops.cross_entropy_(torch.randn(2, 5), torch.tensor([0, label]), 0.0)


def test_the_operators_take_the_native_path_and_say_so() -> None:
    if library.unavailable():
        pytest.skip(str(library.unavailable()))
    assert dispatcher.code("rows", CPU) is native
    assert dispatcher.choice("rows", CPU) == Choice("native")
    assert dispatcher.code("rows", torch.device("meta")) is reference
    assert dispatcher.choice("rows", torch.device("meta")) == Choice("torch", "there is no fast backend for meta")


@pytest.mark.parametrize("name", [*OPERANDS, "decode_attention"])
def test_a_path_with_a_wrong_result_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(native, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        changed = arguments[3] if name == "dropout" else arguments[0] if result is None else result
        (changed[0] if isinstance(changed, tuple) else changed).view(-1)[-1] += 0.1
        return result

    monkeypatch.setattr(native, name, wrong)
    monkeypatch.setattr(library, "unavailable", lambda: None)
    fresh = Dispatcher()
    assert fresh.code("rows", CPU) is reference
    assert f"failed: {name} in torch." in (fresh.choice("rows", CPU).reason or "")


def test_the_backend_is_chosen_rightly_in_the_middle_of_a_step() -> None:
    """Autocast and the backward pass of a step do not reach into the self-test."""
    if library.unavailable():
        pytest.skip(str(library.unavailable()))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert Dispatcher().choice("rows", CPU) == Choice("native")
