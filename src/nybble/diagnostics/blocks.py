"""Checks of the parts of a training step: row operators, attention of flattened rows, adapters, MLP and loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.diagnostics.layers import apart_at_worst, gradient, packed_linear, with_gradients
from nybble.diagnostics.measure import CheckOutcome, UnavailableError, apart, dtypes_of, normal
from nybble.kernels import dispatcher
from nybble.kernels.attention.backend import AttentionBackend
from nybble.kernels.attention.torch import Settings
from nybble.kernels.pointwise.backend import PointwiseBackend
from nybble.nn.gated_mlp import GatedMlp
from nybble.nn.lora_projection import Adapter, Projection, project
from nybble.nn.loss import Head, next_token_loss

_DOCUMENTS = (5, 1, 40, 40, 66)  # tokens
_ALONE = (-1, -1, -1, -1, -1)  # which document each of them continues
_TREE = (-1, 0, 1, 0, -1)
_HEADS = 4
_KV_HEADS = 2
_DROPOUT = 0.25
_SEED = 7


def row_operators(device: torch.device, path: str) -> CheckOutcome:
    """Check norm, gate, loss of a row and rotary positions, forward and backward, and every bit of the dropout mask."""
    (backend,) = dispatcher.named("rows", path, device)
    why_not = backend.unavailable()
    if why_not:
        raise UnavailableError(why_not)
    code: PointwiseBackend = backend.load()
    return CheckOutcome(
        max(check(code, device, t) for check in (_norm, _gate, _row_loss, _turn) for t in dtypes_of(device))
    )


def _norm(code: PointwiseBackend, device: torch.device, dtype: torch.dtype) -> float:
    x = normal(9, 67, seed=1, dtype=dtype)
    g = normal(9, 67, seed=2, dtype=dtype)
    w = normal(67, seed=3, dtype=dtype)
    worst = 0.0
    for unit_offset in (False, True):
        y, rstd = code.rms_norm(x.to(device), w.to(device), 1e-6, unit_offset)
        dx = code.rms_norm_backward(g.to(device), x.to(device), w.to(device), rstd, unit_offset)
        wide = x.double().requires_grad_()
        scale = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        exact = wide * scale * (w.double() + unit_offset)
        exact.backward(g.double())
        worst = max(worst, apart_at_worst([y, dx], [exact.detach(), gradient(wide)]))
    return worst


def _gate(code: PointwiseBackend, device: torch.device, dtype: torch.dtype) -> float:
    worst = 0.0
    for name, active in (("silu", functional.silu), ("gelu_tanh", partial(functional.gelu, approximate="tanh"))):
        gate, up, grad = (normal(9, 67, seed=s, dtype=dtype) for s in range(3))
        y = code.gated(gate.to(device), up.to(device), name)
        buffers = [t.to(device, copy=True) for t in (grad, gate, up)]
        code.gated_backward_(buffers[0], buffers[1], buffers[2], name)
        wide = [t.double().requires_grad_() for t in (gate, up)]
        exact = active(wide[0]) * wide[1]
        exact.backward(grad.double())
        results = [exact.detach(), exact.detach(), *map(gradient, wide)]
        worst = max(worst, apart_at_worst([y, *buffers], results))
    x = normal(9, 67, seed=3, dtype=dtype)
    out = torch.empty(9, 67, dtype=dtype, device=device)
    code.dropout(x.to(device), _DROPOUT, _SEED, out)
    mask = torch.tensor([_hash(index, _SEED) >= _DROPOUT * 2**32 for index in range(x.numel())]).view(x.shape)
    expected = torch.where(mask, x.double() / (1 - _DROPOUT), 0.0)
    return max(worst, apart(out, expected) if torch.equal(out.cpu() == 0, ~mask | (x == 0)) else math.inf)


def _row_loss(code: PointwiseBackend, device: torch.device, dtype: torch.dtype) -> float:
    logits = normal(9, 131, seed=1, dtype=dtype)
    labels = torch.arange(9) * 17 % 131
    buffer = logits.to(device, copy=True)  # receives the gradient
    losses = code.cross_entropy_(buffer, labels.to(device), 0.0)
    wide = logits.double().requires_grad_()
    exact = functional.cross_entropy(wide, labels, reduction="none")
    exact.sum().backward()
    return apart_at_worst([losses, buffer], [exact.detach(), gradient(wide)])


def _turn(code: PointwiseBackend, device: torch.device, dtype: torch.dtype) -> float:
    x = normal(9, 3, 22, seed=1, dtype=dtype)
    angles = normal(9, 7, seed=2).double()
    turned = torch.polar(torch.ones_like(angles), angles)[:, None] * torch.complex(*x.double()[..., :14].chunk(2, -1))
    exact = torch.cat([turned.real, turned.imag, x.double()[..., 14:]], dim=-1)
    cos, sin = (f(angles).float().repeat(1, 2).to(device) for f in (torch.cos, torch.sin))
    rotated = code.rope(x.to(device), cos, sin, False)
    restored = code.rope(exact.to(device, dtype), cos, sin, True)
    return apart_at_worst([rotated, restored], [exact, x.double()])


def _hash(index: int, seed: int) -> int:
    """The finalizer of MurmurHash3, from which dropout derives its mask."""
    h = (index * 0x9E3779B1 + seed) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def attention_of_documents(device: torch.device, path: str) -> CheckOutcome:
    """Check causal attention within each document at common head sizes: y and the gradients of q, k and v."""
    worst = 0.0
    n = sum(_DOCUMENTS)
    named = dispatcher.named("attend", path, device)
    why_not = next(filter(None, (backend.unavailable() for backend in named)), None)
    if why_not:
        raise UnavailableError(why_not)
    backends: list[AttentionBackend] = [backend.load() for backend in named]
    for size, window, parents in (
        (64, None, _ALONE),
        (96, None, _ALONE),
        (128, None, _ALONE),
        (256, None, _ALONE),
        (64, 9, _ALONE),
        (64, None, _TREE),
    ):
        settings = Settings(_DOCUMENTS, size**-0.5, window, parents=parents if parents != _ALONE else ())
        q, grad = (normal(n, _HEADS, size, seed=s, dtype=torch.bfloat16) for s in (0, 1))
        k, v = (normal(n, _KV_HEADS, size, seed=s, dtype=torch.bfloat16) for s in (2, 3))
        inputs = (q.to(device), k.to(device), v.to(device))
        backend = next((backend for backend in backends if backend.takes(inputs[0], settings)), None)
        if backend is None:
            continue
        results = [*backend.derive(inputs, grad.to(device), settings)]
        wide = [t.double().requires_grad_() for t in (q, k, v)]
        exact = _attended(wide, window, parents)
        exact.backward(grad.double())
        worst = max(worst, apart_at_worst(results, [exact.detach(), *map(gradient, wide)]))
    return CheckOutcome(worst)


def _attended(inputs: Sequence[Tensor], window: int | None, parents: Sequence[int]) -> Tensor:
    """Attention by its definition, with a mask of all tokens by all tokens."""
    q, k, v = (t.transpose(0, 1) for t in inputs)
    k, v = (t.repeat_interleave(_HEADS // _KV_HEADS, 0) for t in (k, v))
    owner = torch.repeat_interleave(torch.arange(len(_DOCUMENTS)), torch.tensor(_DOCUMENTS))
    back = torch.arange(len(owner))[:, None] - torch.arange(len(owner))[None, :]
    of_path = torch.eye(len(_DOCUMENTS), dtype=torch.bool)  # which documents a document sees
    for document, parent in enumerate(parents):
        if parent >= 0:
            of_path[document] |= of_path[parent]
    seen = of_path[owner][:, owner] & (back >= 0) & (back < (window or len(owner)))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
    result: Tensor = (scores.softmax(-1) @ v).transpose(0, 1)
    return result


def adapted_linears(device: torch.device, _path: str) -> CheckOutcome:
    """Check two packed linears with adapters that share x, at ranks 8, 16 and 64: y and the gradients of x, A and B."""
    worst = 0.0
    dtype = torch.bfloat16
    for rank in (8, 16, 64):
        adapted = [_adapted(48 * i, 96, rank, device, seed=10 * i) for i in (1, 2)]
        x = normal(40, 96, seed=5, dtype=dtype)
        grads = [normal(40, 48 * i, seed=6 + i, dtype=dtype) for i in (1, 2)]
        x_on_device = x.to(device, copy=True).requires_grad_()
        results = project(x_on_device, [projection for projection, _ in adapted])
        torch.autograd.backward(results, [g.to(device) for g in grads])
        masters = [m for p, _ in adapted if p.adapter for m in (p.adapter.a, p.adapter.b)]
        wide = x.double().requires_grad_()
        exact = []
        leaves = []
        for (projection, weight), grad in zip(adapted, grads, strict=True):
            y, parts = _exactly(wide, projection, weight)
            y.backward(grad.double(), retain_graph=True)
            exact.append(y.detach())
            leaves += parts
        actual = [*(y.detach() for y in results), gradient(x_on_device), *(gradient(m).to(dtype) for m in masters)]
        worst = max(worst, apart_at_worst(actual, [*exact, gradient(wide), *map(gradient, leaves)]))
    return CheckOutcome(worst)


def adapted_mlp(device: torch.device, _path: str) -> CheckOutcome:
    """Check the gated MLP with packed weights and adapters: y and the gradients of x and of every A and B."""
    dtype = torch.bfloat16
    worst = 0.0
    for activation, active in (("silu", functional.silu), ("gelu_tanh", partial(functional.gelu, approximate="tanh"))):
        shapes = ((128, 64), (128, 64), (64, 128))
        (gate, g64), (up, u64), (down, d64) = (_adapted(*s, 8, device, seed=i) for i, s in enumerate(shapes))
        x = normal(40, 64, seed=7, dtype=dtype)
        grad = normal(40, 64, seed=8, dtype=dtype)
        block = GatedMlp((gate, up), down, activation, output_is_kept=True)
        results = with_gradients(block, [x], grad, device)
        masters = [m for p in block.projections if p.adapter for m in (p.adapter.a, p.adapter.b)]
        wide = x.double().requires_grad_()
        g, g_parts = _exactly(wide, gate, g64)
        u, u_parts = _exactly(wide, up, u64)
        y, d_parts = _exactly(active(g) * u, down, d64)
        y.backward(grad.double())
        exact = [y.detach(), gradient(wide), *map(gradient, [*g_parts, *u_parts, *d_parts])]
        worst = max(worst, apart_at_worst([*results, *(gradient(m).to(dtype) for m in masters)], exact))
    return CheckOutcome(worst)


def loss_without_logits(device: torch.device, _path: str) -> CheckOutcome:
    """Check the summed loss of learned rows through the output head, and the gradient of the hidden states."""
    worst = 0.0
    targets = torch.arange(300) * 13 % 500
    for dtype in dtypes_of(device):
        hidden = normal(300, 64, seed=1, dtype=dtype)
        weight = normal(500, 64, seed=2, dtype=dtype) / 8
        head = Head(weight.to(device), None, 0.0)
        results = with_gradients(
            lambda x, head=head: next_token_loss(x, targets.to(device), head, 300), [hidden], torch.ones(()), device
        )
        results[0] = results[0].to(dtype)  # the logits have no more precision than this
        wide = hidden.double().requires_grad_()
        exact = functional.cross_entropy(wide @ weight.double().t(), targets)
        exact.backward()
        worst = max(worst, apart_at_worst(results, [exact.detach(), gradient(wide)]))
    return CheckOutcome(worst)


def _adapted(out: int, into: int, rank: int, device: torch.device, seed: int) -> tuple[Projection, Tensor]:
    """A packed linear layer with an adapter, and its weight in float64."""
    layer, weight = packed_linear(out, into, device, torch.bfloat16, seed=seed)
    shapes = ((rank, into, seed + 1), (out, rank, seed + 2))
    a, b = (nn.Parameter((normal(m, n, seed=s) / 8).to(device)) for m, n, s in shapes)
    return Projection(layer, torch.bfloat16, Adapter(a, b, 2.0, 0.0, 0)), weight


def _exactly(x: Tensor, projection: Projection, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The product in float64 of the values as the compute type holds them, and the float64 leaves for A and B."""
    if projection.adapter is None:
        return x @ weight.t(), []
    masters = (projection.adapter.a, projection.adapter.b)
    a, b = (m.detach().cpu().to(projection.dtype).double().requires_grad_() for m in masters)
    return x @ weight.t() + projection.adapter.scaling * x @ a.t() @ b.t(), [a, b]
