"""Every backward written by hand, against finite differences in float64; and what the blocks keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.nn.attention import Span, attend_rows
from nybble.nn.dropout_seed import DropoutSeeds
from nybble.nn.gated_mlp import GatedMlp
from nybble.nn.lora_projection import Adapter, Projection, project, projection_of
from nybble.nn.loss import Head, TokenRows, next_token_loss, token_losses
from nybble.nn.norm import rms_norm

IN, OUT, R, ROWS = 6, 5, 2, 4


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def check(run: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> None:
    """One backward pass against central differences; the blocks reuse memory, so gradcheck's second pass is refused."""

    def total(*values: Tensor) -> Tensor:
        outputs = run(*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.stack([(y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum() for y in outputs]).sum()

    analytic = torch.autograd.grad(total(*inputs), inputs)
    step = 1e-6
    for place, tensor in enumerate(inputs):
        for index in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in inputs]
                moved[place].view(-1)[index] += sign * step
                ends.append(float(total(*moved)))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(analytic[place].view(-1)[index]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def frozen(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=bias, dtype=torch.float64).requires_grad_(False)


def with_adapter(layer: nn.Linear, a: Tensor, b: Tensor, dropout: float, seed: int = 3) -> Projection:
    return Projection(layer, torch.float64, Adapter(a, b, 1.7, dropout, seed))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_projection_gradients(dropout: float, bias: bool) -> None:
    layers = [frozen(IN, OUT, bias), frozen(IN, OUT + 2, bias), frozen(IN, OUT, bias)]

    def run(x: Tensor, a1: Tensor, b1: Tensor, a3: Tensor, b3: Tensor) -> tuple[Tensor, ...]:
        adapted = [with_adapter(layers[0], a1, b1, dropout), with_adapter(layers[2], a3, b3, dropout, 8)]
        return tuple(project(x, [adapted[0], Projection(layers[1], torch.float64), adapted[1]]))

    inputs = [rand(ROWS, IN, grad=True)]
    inputs += [rand(*shape, grad=True) for shape in ((R, IN), (OUT, R), (R, IN), (OUT, R))]
    check(run, inputs)


def test_a_rank_that_is_filled_up_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on RDNA4, whose library reads past narrow products."""
    layer, x = frozen(IN, OUT), rand(ROWS, IN, grad=True)
    a, b = rand(R, IN, grad=True), rand(OUT, R, grad=True)
    cotangent = rand(ROWS, OUT)
    results = []
    for multiple in (1, 64):
        monkeypatch.setattr("nybble.nn.lora_projection._rank_multiple", lambda _kind, m=multiple: m)
        (y,) = project(x, [with_adapter(layer, a, b, 0.3)])
        results.append([y, *torch.autograd.grad(y, [x, a, b], cotangent)])
    for narrow, filled in zip(*results, strict=True):
        torch.testing.assert_close(filled, narrow)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("adapted", [(), ("gate",), ("down",), ("gate", "up", "down")])
@pytest.mark.parametrize("merged", [False, True])
def test_gated_mlp_gradients(activation: str, adapted: tuple[str, ...], merged: bool) -> None:
    inner = 5
    sizes = {"gate_up": (IN, 2 * inner)} if merged else {"gate": (IN, inner), "up": (IN, inner)}
    sizes["down"] = (inner, IN)
    if merged:
        adapted = tuple(dict.fromkeys("gate_up" if name in ("gate", "up") else name for name in adapted))
    layers = {name: frozen(*size) for name, size in sizes.items()}

    def run(x: Tensor, *masters: Tensor) -> Tensor:
        left = iter(masters)
        made = [
            with_adapter(layer, next(left), next(left), 0.2, seed)
            if name in adapted
            else Projection(layer, torch.float64)
            for seed, (name, layer) in enumerate(layers.items())
        ]
        return GatedMlp(tuple(made[:-1]), made[-1], activation, True)(x)

    masters = [
        rand(*shape, grad=True)
        for name in sizes
        if name in adapted
        for shape in ((R, sizes[name][0]), (sizes[name][1], R))
    ]
    check(run, [rand(ROWS, IN, grad=True), *masters])


@pytest.mark.parametrize("adapted", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("tile", [1, 2, 3])
def test_a_tiled_mlp_is_the_whole_one(adapted: tuple[int, ...], tile: int) -> None:
    """Dropout too: a tile's mask is its part of the whole's."""
    sizes = ((IN, 5), (IN, 5), (5, IN))
    layers = [frozen(*size) for size in sizes]
    masters = [(rand(R, n_in, grad=True), rand(n_out, R, grad=True)) for n_in, n_out in sizes]
    x, cotangent = rand(ROWS, IN, grad=True), rand(ROWS, IN)
    results = []
    for rows in (0, tile):
        made = [
            with_adapter(layer, *masters[n], 0.4, seed=11 + n) if n in adapted else Projection(layer, torch.float64)
            for n, layer in enumerate(layers)
        ]
        y = GatedMlp((made[0], made[1]), made[2], "silu", True, rows)(x)
        wanted = [x, *(t for n in adapted for t in masters[n])]
        results.append([y, *torch.autograd.grad(y, wanted, cotangent)])
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=1e-7)  # the fast paths round to float32


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm_gradient(unit_offset: bool) -> None:
    weight = rand(IN)
    check(lambda x: rms_norm(x, weight, 1e-6, unit_offset), [rand(ROWS, IN, grad=True)])


@pytest.mark.parametrize("rotated", [4, 2])
def test_attention_over_rows_gradient(rotated: int) -> None:
    angles = rand(ROWS, rotated // 2).repeat(1, 2)
    q, k, v = rand(ROWS, 2, 4, grad=True), rand(ROWS, 1, 4, grad=True), rand(ROWS, 1, 4, grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_rows(q, k, v, (angles.cos(), angles.sin()), (1, ROWS - 1), Span(0.5))

    check(run, [q, k, v])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("piece", [1, 2, 100])
def test_loss_gradients_and_value(softcap: float, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.nn.loss._LEAST_ROWS", piece)
    monkeypatch.setattr("nybble.nn.loss._PIECE_BYTES", 1)
    hidden, weight, targets = rand(ROWS, IN, grad=True), rand(9, IN, grad=True), torch.tensor([0, 8, 3, 3])
    bias = rand(9)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return next_token_loss(hidden, targets, Head(weight, bias, softcap), 7)

    logits = hidden @ weight.t() + bias
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum") / 7
    each = nn.functional.cross_entropy(logits, targets, reduction="none")
    with torch.no_grad():
        torch.testing.assert_close(token_losses(hidden, targets, Head(weight, bias, softcap)), each.float())
    grads = torch.autograd.grad(expected, (hidden, weight))
    value = run(hidden, weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for seen, wanted in zip(torch.autograd.grad(value, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=2e-7, atol=1e-12)  # 1 / 7 is float32


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("piece", [1, 2, 100])
@pytest.mark.parametrize("trained", ["nothing", "head", "rows"])
def test_a_coefficient_for_each_token(
    softcap: float, piece: int, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.nn.loss._LEAST_ROWS", piece)
    monkeypatch.setattr("nybble.nn.loss._PIECE_BYTES", 1)
    hidden, weight, targets = rand(ROWS, IN, grad=True), rand(9, IN, grad=trained == "head"), torch.tensor([0, 8, 3, 3])
    rows = TokenRows(torch.tensor([3, 7]), rand(2, IN, grad=True)) if trained == "rows" else None

    def plain(hidden: Tensor, weight: Tensor, values: Tensor | None) -> Tensor:
        whole = weight if values is None else weight.index_copy(0, torch.tensor([3, 7]), values)
        logits = hidden @ whole.t()
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    def ours(hidden: Tensor, weight: Tensor, values: Tensor | None) -> Tensor:
        return token_losses(hidden, targets, Head(weight, None, softcap, rows and TokenRows(rows.numbers, values)))

    def weighed(losses: Tensor) -> Tensor:  # as an objective does: the coefficients depend on the losses
        return torch.nn.functional.softplus(losses[:2].sum() - losses[2:].sum()) + 0.3 * losses[1]

    inputs = (hidden, weight, rows.values if rows else None)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    torch.testing.assert_close(ours(*inputs), plain(*inputs))
    seen = torch.autograd.grad(weighed(ours(*inputs)), wanted)
    for one, other in zip(seen, torch.autograd.grad(weighed(plain(*inputs)), wanted), strict=True):
        torch.testing.assert_close(one, other)
    # gradcheck asks the same graph for its gradient several times, and ours is scaled in place: one direction by hand.
    along, step = [torch.randn_like(t) for t in wanted], 1e-6

    def value(sign: int) -> float:
        moved = {id(t): (t + sign * step * d).detach() for t, d in zip(wanted, along, strict=True)}
        with torch.no_grad():
            return weighed(plain(*(moved.get(id(t), t) for t in inputs))).item()

    slope = sum(float((g * d).sum()) for g, d in zip(seen, along, strict=True))
    assert slope == pytest.approx((value(1) - value(-1)) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("n", [5, 1500])
def test_16_bit_gradients_of_each_token_are_weighed_in_float32(n: int) -> None:
    hidden = torch.randn(n, IN).bfloat16().requires_grad_()
    head, targets, weights = Head(torch.randn(9, IN).bfloat16(), None, 0.0), torch.randint(9, (n,)), torch.rand(n)
    each = torch.autograd.grad(token_losses(hidden, targets, head).sum(), hidden)[0]
    weighed = torch.autograd.grad((token_losses(hidden, targets, head) * weights).sum(), hidden)[0]
    assert torch.equal(weighed, (each.float() * weights[:, None]).bfloat16())


@pytest.mark.parametrize("n", [5, 1500])
def test_16_bit_gradients_of_the_loss_are_divided_in_float32(n: int) -> None:
    hidden = torch.randn(n, IN).bfloat16().requires_grad_()
    weight, targets = torch.randn(9, IN).bfloat16(), torch.randint(9, (n,))
    sums, means = (
        torch.autograd.grad(next_token_loss(hidden, targets, Head(weight, None, 0.0), items), hidden)[0]
        for items in (1, 37)
    )
    assert torch.equal(means, (sums.float() * (torch.ones(()) / 37)).bfloat16())


def test_loss_of_no_learned_token_is_zero() -> None:
    hidden = rand(0, IN, grad=True)
    loss = next_token_loss(hidden, torch.empty(0, dtype=torch.int64), Head(rand(9, IN), None, 0.0), 1)
    loss.backward()
    assert loss.item() == 0.0


def test_a_layer_with_hooks_or_trained_weights_is_called_and_not_read() -> None:
    layer = frozen(IN, OUT)
    assert projection_of(layer) is not None
    handle = layer.register_forward_hook(lambda *_: None)
    assert projection_of(layer) is None
    handle.remove()
    assert projection_of(layer.requires_grad_(True)) is None


def kept_bytes(run: Any) -> int:
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return sum(seen.values())


def test_a_frozen_mlp_keeps_gate_and_up_alone() -> None:
    x = torch.randn(32, 16, requires_grad=True)
    layers = [nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)]
    made = [Projection(layer.requires_grad_(False), torch.float32) for layer in layers]
    block = GatedMlp(tuple(made[:2]), made[2], "silu", False)
    assert kept_bytes(lambda: block(x)) == 2 * 32 * 24 * 4


def test_seeds_differ_by_step_place_and_run_and_are_repeatable() -> None:
    drawn = {DropoutSeeds(run, step).of(place) for run in range(3) for step in range(5) for place in range(7)}
    assert len(drawn) == 3 * 5 * 7
    assert DropoutSeeds(2, 3).of(1) == DropoutSeeds(2, 3).of(1)
    assert len({DropoutSeeds().of(0) for _ in range(8)}) > 1  # outside a training loop: torch's generator
