"""The step of a mixture of experts over packed weights, with a backward pass by hand.

    y_t = sum over the experts e of token t of  w_te f_e(x_t),      f_e(x) = act(x Gu_e^T + b) Gd_e^T + b'

G is the decoded weight plus s B_e A_e where an adapter is trained. Tokens are sorted by expert once; each expert's
weights are decoded into memory that all experts reuse, and multiplied by its tokens in the vendor's product. Of the
activations only x and the routing are kept: the backward pass computes the first projection and the activation again,
and needs the output of neither projection, since with g = dL/dy Gd_e

    dL/dw = g h      dL/dh = w g      (h the activation's result)

Sums over experts are float32. Nothing depends on the order in which the tokens came, so results repeat bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nybble.kernels import LowRank, most_rows, multiply
from nybble.kernels.pointwise import ops as pointwise
from nybble.nn import stand_in
from nybble.nn.lora_projection import Adapter, wide_product, without_autocast

if TYPE_CHECKING:
    from nybble.nn.experts4bit import Experts4bit

# Projection -> LoRA on all of its experts in PEFT's layout: A (E r, in) has the experts one behind the other, B
# (out, r E) has those of one rank side by side.
ExpertAdapters = Mapping[str, Adapter]
DOWN = "down_proj"


def mixture(x: Tensor, index: Tensor, weights: Tensor, experts: Experts4bit, adapters: ExpertAdapters) -> Tensor:
    """`x (T, hidden)` through its experts `index (T, k)`, weighted by `weights (T, k)`; in the type of x."""
    flat = x.to(experts.compute_dtype)
    with without_autocast(x, experts.compute_dtype):
        if torch.is_grad_enabled():
            masters = [tensor for adapter in adapters.values() for tensor in (adapter.a, adapter.b)]
            y: Tensor = _Mixture.apply(flat, weights, index, experts, dict(adapters), *masters)
        else:
            y = _without_gradients(flat, weights, _route(index, experts.n_experts), experts, adapters)
    return y.to(x.dtype)


class _Share(NamedTuple):
    """The tokens of one expert."""

    expert: int
    places: Tensor  # in the flattened index
    rows: Tensor  # of x
    n_alike: int = 1  # shares like it that a real step has, where a step is traced
    n_decoded: int = 1  # experts that such a step decodes


def _route(index: Tensor, n_experts: int) -> list[_Share]:
    """The tokens of each expert that has any, in their order."""
    n_tokens, k = index.shape
    flat = index.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    rows = order // k
    if isinstance(flat, FakeTensor):
        # A traced step knows no routing. The most memory is taken where one expert gets every token; k such shares are
        # the products of any routing, and by then every expert is decoded.
        return [_Share(0, order[:n_tokens], rows[:n_tokens], min(k, n_experts), min(n_tokens * k, n_experts))]
    counts = torch.bincount(flat, minlength=n_experts).tolist()[:n_experts]
    shares = []
    first = 0
    for expert, n in enumerate(counts):
        if n:
            shares.append(_Share(expert, order[first : first + n], rows[first : first + n]))
        first += n
    return shares


@dataclass(frozen=True)
class _Factors:
    """An adapter's factors for one expert in the compute type."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float


class _Adapter:
    """An adapter with the factors of all experts in the compute type, and its gradients."""

    def __init__(self, adapter: Adapter, n_experts: int, dtype: torch.dtype) -> None:
        self.adapter, self.n_experts = adapter, n_experts
        self.a = adapter.a.detach().view(n_experts, -1, adapter.a.shape[1]).to(dtype)
        self.b = adapter.b.detach().view(len(adapter.b), -1, n_experts).permute(2, 0, 1).to(dtype).contiguous()
        self.da: Tensor | None = None
        self.db: Tensor | None = None

    def of(self, expert: int) -> _Factors:
        return _Factors(self.a[expert], self.b[expert], self.adapter.scaling)

    def add_gradients(self, expert: int, grad: Tensor, x: Tensor, xa: Tensor) -> Tensor:
        """Note dA and dB of one expert, whose output has the gradient `grad`; returns s grad B, `(n, r)`."""
        if self.da is None or self.db is None:
            self.da = torch.zeros_like(self.a, dtype=self.adapter.a.dtype)
            self.db = torch.zeros_like(self.b, dtype=self.adapter.b.dtype)
        dxa = (grad @ self.b[expert]).mul_(self.adapter.scaling)
        self.da[expert] = wide_product(dxa.t(), x, self.da.dtype)
        self.db[expert] = wide_product(grad.t(), xa, self.db.dtype).mul_(self.adapter.scaling)
        return dxa

    def gradients(self) -> tuple[Tensor, Tensor]:
        """dA and dB as PEFT lays the factors out."""
        if self.da is None or self.db is None:  # no expert had a token
            return torch.zeros_like(self.adapter.a), torch.zeros_like(self.adapter.b)
        return self.da.view(self.adapter.a.shape), self.db.permute(1, 2, 0).reshape(self.adapter.b.shape)


def _adapters(adapters: ExpertAdapters, experts: Experts4bit) -> dict[str, _Adapter]:
    return {name: _Adapter(a, experts.n_experts, experts.compute_dtype) for name, a in adapters.items()}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, factors: _Factors | None) -> tuple[Tensor, Tensor | None]:
    """x W^T + b + s (x A^T) B^T, and x A^T."""
    y = x @ weight.t()
    if bias is not None:
        y += bias.to(y.dtype)
    if factors is None:
        return y, None
    xa = x @ factors.a.t()
    return y.addmm_(xa, factors.b.t(), alpha=factors.scaling), xa


class _Activated:
    """h of the first projection's output, and the way back."""

    def __init__(self, y: Tensor, experts: Experts4bit, needs_gradient: bool) -> None:
        self._name = experts.activation
        if self._name is not None:
            self._gate, self._up = (half.contiguous() for half in y.chunk(2, dim=-1))
            self.h = pointwise.direct(self._gate, self._up).gated(self._gate, self._up, self._name)
            return
        if not needs_gradient:
            self.h = experts.activate(y)
            return
        self._y = y.detach().requires_grad_()
        with torch.enable_grad():
            self._h = experts.activate(self._y)
        self.h = self._h.detach()

    def backward(self, dh: Tensor) -> Tensor:
        """The gradient of the first projection's output; `dh` and what is kept are overwritten."""
        if self._name is None:
            return torch.autograd.grad(self._h, self._y, dh)[0]
        pointwise.direct(dh, self._gate, self._up).gated_backward_(dh, self._gate, self._up, self._name)
        return torch.cat([self._gate, self._up], dim=-1)


def _forward(
    x: Tensor, weights: Tensor, shares: list[_Share], experts: Experts4bit, adapters: Mapping[str, _Adapter]
) -> Tensor:
    first = next(iter(experts.stacks))
    flat = weights.reshape(-1, 1)
    total = x.new_zeros(len(x), experts.stacks[DOWN].out_features, dtype=_wide(x.dtype))
    for share in shares:
        with stand_in.done(share.n_decoded):
            decoded = experts.decoded(share.expert, x.dtype)
        with stand_in.done(share.n_alike):
            found = {name: adapter.of(share.expert) for name, adapter in adapters.items()}
            y, _ = _product(x[share.rows], decoded[first], experts.bias_of(first, share.expert), found.get(first))
            h = _Activated(y, experts, needs_gradient=False).h
            y, _ = _product(h, decoded[DOWN], experts.bias_of(DOWN, share.expert), found.get(DOWN))
            total.index_add_(0, share.rows, y.to(total.dtype) * flat[share.places].to(total.dtype))
            del h, y  # so that they do not lie beside those of the next expert
    return total.to(x.dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, experts: Experts4bit, adapters: ExpertAdapters,
        *masters: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.experts, ctx.adapters = experts, adapters
        ctx.save_for_backward(x, weights, index)
        return _forward(x, weights, _route(index, experts.n_experts), experts, _adapters(adapters, experts))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weights, index = ctx.saved_tensors
        adapters = _adapters(ctx.adapters, ctx.experts)
        shares = _route(index, ctx.experts.n_experts)
        with torch.autocast(grad.device.type, enabled=False):
            dx, dw = _backward(grad, x, weights, shares, ctx.experts, adapters, ctx.needs_input_grad[0])
        found = [tensor for adapter in adapters.values() for tensor in adapter.gradients()]
        return (dx, dw, None, None, None, *found)


def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    shares: list[_Share],
    experts: Experts4bit,
    adapters: Mapping[str, _Adapter],
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """dx and the gradient of the weights; those of the adapters are noted in them."""
    flat = weights.reshape(-1, 1).to(x.dtype)
    dw = torch.zeros(weights.numel(), dtype=_wide(x.dtype), device=x.device)
    dx = x.new_zeros(x.shape, dtype=_wide(x.dtype)) if needs_dx else None
    for share in shares:
        with stand_in.done(share.n_decoded):
            decoded = experts.decoded(share.expert, x.dtype)
        with stand_in.done(share.n_alike):
            dx_e = _backward_of(share, decoded, grad, x, flat, dw, experts, adapters, needs_dx)
            if dx is not None and dx_e is not None:
                dx.index_add_(0, share.rows, dx_e.to(dx.dtype))
            del dx_e
    return None if dx is None else dx.to(x.dtype), dw.view(weights.shape).to(weights.dtype)


def _backward_of(
    share: _Share,
    decoded: Mapping[str, Tensor],
    grad: Tensor,
    x: Tensor,
    weights: Tensor,  # (T k, 1), in the type of x
    dw: Tensor,  # (T k), of which the share's places are filled
    experts: Experts4bit,
    adapters: Mapping[str, _Adapter],
    needs_dx: bool,
) -> Tensor | None:
    """The gradient of one expert's rows of x."""
    first = next(iter(experts.stacks))
    expert, places, rows = share.expert, share.places, share.rows
    factors = {name: adapter.of(expert) for name, adapter in adapters.items()}
    x_e, grad_e = x[rows], grad[rows]
    y, xa = _product(x_e, decoded[first], experts.bias_of(first, expert), factors.get(first))
    middle = _Activated(y, experts, needs_gradient=True)
    del y
    dh = grad_e @ decoded[DOWN]
    down = factors.get(DOWN)
    if down is not None:
        dh.addmm_(grad_e @ down.b, down.a, alpha=down.scaling)
    of_weights = (dh.to(dw.dtype) * middle.h.to(dw.dtype)).sum(-1)
    bias = experts.bias_of(DOWN, expert)
    if bias is not None:
        of_weights += grad_e.to(dw.dtype) @ bias.to(dw.dtype)
    dw[places] = of_weights
    dh *= weights[places]
    if down is not None:
        adapters[DOWN].add_gradients(expert, grad_e * weights[places], middle.h, middle.h @ down.a.t())
    dy = middle.backward(dh)
    dx_e = dy @ decoded[first] if needs_dx else None
    if xa is not None:
        dxa = adapters[first].add_gradients(expert, dy, x_e, xa)
        if dx_e is not None:
            dx_e.addmm_(dxa, factors[first].a)
    return dx_e


def _without_gradients(
    x: Tensor, weights: Tensor, shares: list[_Share], experts: Experts4bit, adapters: ExpertAdapters
) -> Tensor:
    """Several tokens as in training; for a few, as in generation, packed weights are multiplied without decoding."""
    first = next(iter(experts.stacks))
    most = most_rows(x, experts.packed(DOWN, 0, 0))
    if not shares or max(len(share.rows) for share in shares) > most:
        return _forward(x, weights, shares, experts, _adapters(adapters, experts))
    flat = weights.reshape(-1, 1)
    total = x.new_zeros(len(x), experts.stacks[DOWN].out_features, dtype=_wide(x.dtype))
    for share in shares:
        y = _few(x[share.rows], first, share.expert, experts, adapters)
        h = _Activated(y, experts, needs_gradient=False).h
        y = _few(h, DOWN, share.expert, experts, adapters)
        total.index_add_(0, share.rows, y.to(total.dtype) * flat[share.places].to(total.dtype))
    return total.to(x.dtype)


def _few(x: Tensor, projection: str, expert: int, experts: Experts4bit, adapters: ExpertAdapters) -> Tensor:
    """A projection of a few rows by one expert, whose weights are not written out."""
    stack, adapter = experts.stacks[projection], adapters.get(projection)
    n_rows = stack.part_shape[0]
    made = []
    for part in range(len(stack.parts)):
        low_rank = None
        if adapter is not None:
            a = adapter.a.view(experts.n_experts, -1, stack.in_features)[expert]
            b = adapter.b.view(stack.out_features, -1, experts.n_experts)[
                part * n_rows : (part + 1) * n_rows, :, expert
            ]
            low_rank = LowRank(a, b.contiguous(), adapter.scaling)
        made.append(multiply(x, experts.packed(projection, expert, part), low_rank))
    y = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
    bias = experts.bias_of(projection, expert)
    return y if bias is None else y + bias.to(y.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return torch.promote_types(dtype, torch.float32)
