"""Attention over documents: every path against float64, no token sees another document, memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from itertools import accumulate, pairwise, product
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nybble.kernels import attend, dispatcher, library
from nybble.kernels.attention import cpu as cpu_attention
from nybble.kernels.attention import ops, varlen
from nybble.kernels.attention import torch as plain_attention
from nybble.kernels.attention.backend import AttentionBackend, Tensors
from nybble.kernels.attention.cpu import NATIVE
from nybble.kernels.attention.sdpa import SDPA
from nybble.kernels.attention.self_test import self_test
from nybble.kernels.attention.torch import Settings
from nybble.kernels.attention.varlen import VARLEN, VARLEN_TREE, VARLEN_WINDOW
from nybble.kernels.dispatch import Choice, Dispatcher

CPU = torch.device("cpu")
LENGTHS = (17, 1, 300, 2, 64, 64, 63, 65)
Results = tuple[Tensor, ...]  # result, dq, dk, dv

# Mean and standard deviation of the largest error of any element, as a share of the largest magnitude of its tensor:
# result, dq, dk and dv of `CASES`, n = 144 (sdpa: 96). CPU (AMD EPYC), 2026-11-23. Allowed is mean + 8 std.
ERRORS: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    ("native", torch.bfloat16): (3.2e-3, 0.8e-3),
    ("sdpa", torch.bfloat16): (4.3e-3, 2.2e-3),
    ("sdpa", torch.float32): (3.2e-7, 1.4e-7),
    ("torch", torch.bfloat16): (2.6e-3, 0.5e-3),
    ("torch", torch.float32): (3.0e-7, 1.4e-7),
    ("torch", torch.float64): (6.0e-16, 4.9e-16),
}
SHORT = (3.3e-3, 1.8e-3)  # the same of native code and documents of `test_documents_of_any_length`, n = 576
SHAPES = ((4, 4, 64), (4, 2, 64), (4, 1, 80), (8, 1, 16), (2, 2, 128), (2, 1, 256))  # heads, kv_heads, width
PARENTS = (-1, 0, 1, 1, 0, 4, -1, 6)  # of trees: most segments begin at odd positions and end within a block
SCORES = ((None, 0.0), (20, 0.0), (64, 0.0), (100, 0.0), (None, 3.0), (7, 3.0))  # window, softcap
CASES = [(*shape, *scores) for shape, scores in product(SHAPES, SCORES)]

native_only = pytest.mark.skipif(cpu_attention.unavailable() is not None, reason=str(cpu_attention.unavailable()))


def derive_plain(inputs: Tensors, grad: Tensor, settings: Settings) -> Results:
    saved = inputs[0], inputs[1], inputs[2], *plain_attention.forward(*inputs, settings)
    return saved[3], *plain_attention.backward(grad, saved, settings)


DERIVE: dict[str, Callable[[Tensors, Tensor, Settings], Results]] = {
    "native": NATIVE.derive,
    "sdpa": SDPA.derive,
    "torch": derive_plain,
}
PATHS = [
    pytest.param(name, dtype, marks=native_only if name == "native" else (), id=f"{name}-{dtype}")
    for name, dtype in ERRORS
]


def drawn(heads: int, kv_heads: int, width: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[Results, Tensor]:
    """q, k and v, and the gradient of a result, in float64 but representable in bfloat16."""
    q, k, v, grad = (
        torch.randn(sum(lengths), n, width).bfloat16().double() for n in (heads, kv_heads, kv_heads, heads)
    )
    return (q, k, v), grad


def exact(inputs: Tensors, grad: Tensor, settings: Settings) -> Results:
    """The definition, a whole matrix of scores and a mask for each document or tree, differentiated by torch."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    parents = settings.parents or [-1] * len(settings.lengths)
    roots = [*(i for i, parent in enumerate(parents) if parent < 0), len(parents)]
    trees = [(settings.lengths[a:b], [max(-1, parent - a) for parent in parents[a:b]]) for a, b in pairwise(roots)]
    results = []
    for tree, *parts in zip(trees, *(x.split([sum(n) for n, _ in trees]) for x in (q, k, v)), strict=True):
        query, *keys = parts
        key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in keys)
        scores = torch.einsum("ihd,jhd->hij", query, key) * settings.scale
        if settings.softcap:
            scores = settings.softcap * torch.tanh(scores / settings.softcap)
        shares = scores.masked_fill(~seen_in(*tree, settings.window), -torch.inf).softmax(-1)
        results.append(torch.einsum("hij,jhd->ihd", shares, value))
    out = torch.cat(results)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def seen_in(lengths: Sequence[int], parents: Sequence[int], window: int | None) -> Tensor:
    """Which tokens of a tree, in columns, the tokens in rows see."""
    paths: list[list[int]] = []
    for segment, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), segment])
    before = [sum(lengths[i] for i in path[:-1]) for path in paths]
    at = torch.cat([n + torch.arange(length) for n, length in zip(before, lengths, strict=True)])
    owner = torch.arange(len(paths)).repeat_interleave(torch.tensor(lengths))
    continued = torch.tensor([[i in path for i in range(len(paths))] for path in paths])
    behind = at.view(-1, 1) - at
    return continued[owner][:, owner] & (behind >= 0) & (behind < (window or len(at)))


def errors(ours: Results, theirs: Results) -> list[float]:
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)]


def differentiated(function: Callable[..., Tensor], inputs: Tensors, grad: Tensor, *arguments: Any) -> Results:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = function(q, k, v, *arguments)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


@pytest.mark.parametrize(("name", "dtype"), PATHS)
def test_every_path_gives_the_result_and_gradients_of_float64(name: str, dtype: torch.dtype) -> None:
    mean, std = ERRORS[name, dtype]
    for heads, kv_heads, width, window, softcap in CASES:
        if name == "sdpa" and softcap:
            continue
        inputs, grad = drawn(heads, kv_heads, width)
        settings = Settings(LENGTHS, width**-0.5, window, softcap)
        ours = DERIVE[name](tuple(x.to(dtype) for x in inputs), grad.to(dtype), settings)
        assert all(x.dtype == dtype and x.is_contiguous() for x in ours)
        seen = errors(ours, exact(inputs, grad, settings))
        assert max(seen) <= mean + 8 * std, (heads, kv_heads, width, window, softcap, seen)


@pytest.mark.parametrize(("name", "dtype"), PATHS)
def test_every_path_sees_what_a_segment_continues(name: str, dtype: torch.dtype) -> None:
    mean, std = ERRORS[name, dtype]
    for heads, kv_heads, width, window, softcap in CASES[::5]:  # each shape and each kind of scores
        if name == "sdpa" and (softcap or window):
            continue
        inputs, grad = drawn(heads, kv_heads, width)
        settings = Settings(LENGTHS, width**-0.5, window, softcap, PARENTS)
        ours = DERIVE[name](tuple(x.to(dtype) for x in inputs), grad.to(dtype), settings)
        assert all(x.dtype == dtype and x.is_contiguous() for x in ours)
        seen = errors(ours, exact(inputs, grad, settings))
        assert max(seen) <= mean + 8 * std, (heads, kv_heads, width, window, softcap, seen)


@pytest.mark.parametrize("length", [1, 2, 17, 63, 64, 65, 95, 96, 97, 128, 129, 300])
@native_only
def test_documents_of_any_length_by_native_code(length: int) -> None:
    mean, std = SHORT
    for window, heads in product((None, 2, 33, 96), ((1, 1), (8, 2), (16, 2))):
        inputs, grad = drawn(*heads, 48, (length,))
        settings = Settings((length,), 0.3, window)
        ours = NATIVE.derive(tuple(x.bfloat16() for x in inputs), grad.bfloat16(), settings)
        theirs = exact(inputs, grad, settings)
        for a, b in zip(ours, theirs, strict=True):  # among few tokens gradients nearly cancel, rounded results do not
            assert (a - b).abs().max().item() <= (mean + 8 * std) * max(b.abs().max().item(), 3.0)


def random_tree(random: Random) -> tuple[list[int], list[int]]:
    """Lengths and parents, in pre-order."""
    parents, path = [-1], [0]
    for segment in range(1, random.randint(2, 9)):
        parents.append(random.choice([-1, *path, *path]))
        path = [*path[: path.index(parents[-1]) + 1], segment] if parents[-1] >= 0 else [segment]
    return [random.choice((1, 2, 3, 7, 8, 31, 95, 96, 97, 128, 150)) for _ in parents], parents


@pytest.mark.parametrize("seed", range(8))
def test_trees_of_any_shape(seed: int) -> None:
    random = Random(seed)
    lengths, parents = random_tree(random)
    heads, kv_heads = random.choice(((1, 1), (8, 2), (4, 4)))
    window, softcap = random.choice(((None, 0.0), (2, 0.0), (33, 0.0), (96, 0.0), (None, 2.0)))
    inputs, grad = drawn(heads, kv_heads, 48, tuple(lengths))
    settings = Settings(lengths, 0.3, window, softcap, parents)
    theirs = exact(inputs, grad, settings)
    assert max(errors(derive_plain(inputs, grad, settings), theirs)) < 1e-13
    if cpu_attention.unavailable() is None:
        mean, std = SHORT
        ours = NATIVE.derive(tuple(x.bfloat16() for x in inputs), grad.bfloat16(), settings)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max().item() <= (mean + 8 * std) * max(b.abs().max().item(), 3.0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_a_tree_equals_its_paths_as_documents(dtype: torch.dtype, allowed: float) -> None:
    lengths, parents = [100, 7, 40, 33, 60], [-1, 0, 1, 1, 0]
    paths = [[0, 1, 2], [0, 1, 3], [0, 4]]
    for window, softcap in ((None, 0.0), (20, 0.0), (None, 3.0)):
        inputs, grad = drawn(4, 2, 64, tuple(lengths))
        inputs, grad = tuple(x.to(dtype) for x in inputs), grad.to(dtype)

        def apart(*tensors: Tensor, scores: Any = (window, softcap)) -> Tensor:
            parts = [x.split(lengths) for x in tensors]
            rows = [torch.cat([part[i] for path in paths for i in path]) for part in parts]
            sizes = [lengths[i] for path in paths for i in path]
            out = attend(*rows, [sum(lengths[i] for i in path) for path in paths], 0.125, *scores).split(sizes)
            return torch.cat([out[0], out[1], out[2], out[5], out[7]])

        ours = differentiated(attend, inputs, grad, lengths, 0.125, window, softcap, parents)
        assert max(errors(ours, differentiated(apart, inputs, grad))) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_branch_changes_nothing_in_the_others(dtype: torch.dtype) -> None:
    starts = [0, *accumulate(LENGTHS)]
    parts = [slice(*pair) for pair in pairwise(starts)]
    for window, softcap in ((None, 0.0), (20, 0.0), (None, 3.0)):
        tensors = (*drawn(4, 2, 64)[0], torch.randn(sum(LENGTHS), 4, 64))
        q, k, v, grad = (x.to(dtype) for x in tensors)
        first = differentiated(attend, (q, k, v), grad, LENGTHS, 0.125, window, softcap, PARENTS)
        for x in (q, k, v, grad):
            x[parts[2]] = 50.0 * torch.randn_like(x[parts[2]])
        second = differentiated(attend, (q, k, v), grad, LENGTHS, 0.125, window, softcap, PARENTS)
        for part in (3, 4, 5, 6, 7):  # its sibling, other branches, another tree
            assert all(torch.equal(a[parts[part]], b[parts[part]]) for a, b in zip(first, second, strict=True))
        for part in (0, 1):  # its ancestors see nothing of it, and their gradients all of it
            assert torch.equal(first[0][parts[part]], second[0][parts[part]])
            assert window == 20 or not torch.equal(first[2][parts[part]], second[2][parts[part]])


def test_parents_that_continue_nothing_change_nothing() -> None:
    inputs, grad = drawn(4, 2, 64)
    for dtype in (torch.float32, torch.bfloat16):
        tensors, wanted = [x.to(dtype) for x in inputs], grad.to(dtype)
        plain = differentiated(attend, tensors, wanted, LENGTHS, 0.125)
        alone = differentiated(attend, tensors, wanted, LENGTHS, 0.125, None, 0.0, [-1] * len(LENGTHS))
        assert all(torch.equal(a, b) for a, b in zip(plain, alone, strict=True))


def test_what_is_gathered_for_trees_does_not_outlive_the_call() -> None:
    saved: list[int] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    (q, k, v), _ = drawn(4, 2, 64)
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = SDPA.attend(*inputs, Settings(LENGTHS, 0.125, parents=PARENTS))
    assert sorted(saved) == sorted(x.numel() for x in inputs)
    out.sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_a_mask_has_a_limit() -> None:
    q = torch.empty(1, 1, 64)
    assert SDPA.takes(q, Settings((4096, 2000), 1.0, parents=(-1, 0)))
    assert not SDPA.takes(q, Settings((4096, 4096), 1.0, parents=(-1, 0)))
    assert not SDPA.takes(q, Settings((4, 4), 1.0, window=2, parents=(-1, 0)))


def test_the_operator_passes_gradcheck_and_has_no_second_derivative() -> None:
    inputs = [x.requires_grad_() for x in drawn(4, 2, 3, (5, 1, 4))[0]]
    for window, softcap, parents in ((None, 0.0, None), (2, 1.5, None), (None, 0.0, (-1, 0, 0)), (3, 1.5, (-1, 0, 1))):
        settings = ((5, 1, 4), 0.7, window, softcap, parents)
        assert torch.autograd.gradcheck(lambda *x, s=settings: torch.ops.nybble.attend(*x, *s)[0], inputs)
    out = torch.ops.nybble.attend(*inputs, *settings)[0]
    (first,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_document_changes_nothing_in_the_others(dtype: torch.dtype) -> None:
    for window, softcap in ((None, 0.0), (20, 0.0), (None, 3.0)):
        (q, k, v), grad = drawn(4, 2, 64)
        first = differentiated(
            attend, [x.to(dtype) for x in (q, k, v)], grad.to(dtype), LENGTHS, 0.125, window, softcap
        )
        there = slice(18, 318)  # the third
        for x in (q, k, v, grad):
            x[there] = 50.0 * torch.randn_like(x[there])
        second = differentiated(
            attend, [x.to(dtype) for x in (q, k, v)], grad.to(dtype), LENGTHS, 0.125, window, softcap
        )
        for a, b in zip(first, second, strict=True):
            assert not torch.equal(a[there], b[there])
            assert torch.equal(a[:18], b[:18])
            assert torch.equal(a[318:], b[318:])


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_flattened_equals_padded(dtype: torch.dtype, allowed: float) -> None:
    lengths = [40, 7, 33]
    inputs, grad = drawn(4, 2, 64, tuple(lengths))

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), True).transpose(1, 2) for x in (q, k, v)]
        out = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
        return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])

    inputs, grad = tuple(x.to(dtype) for x in inputs), grad.to(dtype)
    ours = differentiated(attend, inputs, grad, lengths, 0.125)
    assert max(errors(ours, differentiated(padded, inputs, grad))) < allowed


@pytest.mark.parametrize(("name", "dtype"), PATHS)
def test_extreme_scores_give_numbers(name: str, dtype: torch.dtype) -> None:
    for size, (window, softcap) in product((1e4, 1e15), SCORES):
        if name == "sdpa" and (softcap or size > 1e4):  # torch's own: no number beyond
            continue
        (q, k, v), grad = drawn(2, 1, 64, (1, 33, 130))
        inputs = tuple(x.to(dtype) for x in (q * size, k * size, v))
        for x in DERIVE[name](inputs, grad.to(dtype), Settings((1, 33, 130), 0.125, window, softcap)):
            assert x.isfinite().all(), (size, window, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_may_lie_in_strides(dtype: torch.dtype) -> None:
    fused = torch.randn(sum(LENGTHS), 8, 64).to(dtype)
    parts, grad = fused.split([4, 2, 2], 1), torch.randn(sum(LENGTHS), 4, 64).to(dtype)
    wanted = differentiated(attend, [x.contiguous() for x in parts], grad, LENGTHS, 0.125)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]  # the last stride is not 1
    expanded = grad[:, :1].expand(-1, 4, -1)
    for given in (parts, turned):
        ours = differentiated(attend, given, grad, LENGTHS, 0.125)
        assert ours[0].is_contiguous()
        assert max(errors(ours, tuple(x.double() for x in wanted))) < (1e-6 if dtype == torch.float32 else 1e-2)
    same = differentiated(attend, parts, expanded.contiguous(), LENGTHS, 0.125)
    assert all(
        torch.equal(a, b) for a, b in zip(same, differentiated(attend, parts, expanded, LENGTHS, 0.125), strict=True)
    )


@native_only
def test_threads_make_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grad = drawn(8, 2, 64)
    inputs, grad = tuple(x.bfloat16() for x in inputs), grad.bfloat16()
    alone = NATIVE.derive(inputs, grad, Settings(LENGTHS, 0.125))
    monkeypatch.setattr(cpu_attention, "_WORTH", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for _ in range(5):
        together = NATIVE.derive(inputs, grad, Settings(LENGTHS, 0.125))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    trees = [NATIVE.derive(inputs, grad, Settings(LENGTHS, 0.125, parents=PARENTS)) for _ in range(5)]
    monkeypatch.undo()
    trees.append(NATIVE.derive(inputs, grad, Settings(LENGTHS, 0.125, parents=PARENTS)))
    for tree in trees:
        assert all(torch.equal(a, b) for a, b in zip(trees[0], tree, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_well_behaved(dtype: torch.dtype) -> None:
    inputs, grad = drawn(4, 2, 16, (5, 9))
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    for window, softcap, parents in ((None, 0.0, None), (3, 2.0, None), (None, 0.0, [-1, 0])):
        torch.library.opcheck(torch.ops.nybble.attend.default, (q, k, v, [5, 9], 0.25, window, softcap, parents))
        results = torch.ops.nybble.attend(q, k, v, [5, 9], 0.25, window, softcap, parents)
        saved = [x.detach() for x in (q, k, v, *results)]
        arguments = (grad.to(dtype), saved, [5, 9], 0.25, window, softcap, parents)
        torch.library.opcheck(torch.ops.nybble.attend_backward.default, arguments)


@pytest.mark.parametrize(("device", "mode"), [("cpu", FakeTensorMode), ("meta", FakeTensorMode), ("meta", nullcontext)])
def test_tensors_without_data_pass_through(device: str, mode: Any) -> None:
    with mode():
        q, k, v = (torch.empty(30, n, 64, dtype=torch.bfloat16, device=device) for n in (8, 2, 2))
        out = attend(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, [10, 20], 0.125, 4)
        assert (out.shape, out.dtype, out.device.type, out.is_contiguous()) == (q.shape, q.dtype, device, True)
        for parents in ((), (-1, 0)):
            _, *grads = differentiated(attend, (q, k, v), out, [10, 20], 0.125, 4, 0.0, parents)
            assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(("window", "softcap"), [(None, 5.0), (3000, 0.0), (16, 0.0)])
def test_scores_of_a_long_document_are_never_held(window: int | None, softcap: float) -> None:
    n = 6000  # 36 million scores
    inputs = tuple(torch.randn(n, 1, 16) for _ in range(3))
    for lengths, parents in (((n,), ()), ((n // 2, n // 2), (-1, 0))):
        with Largest() as largest:
            derive_plain(inputs, inputs[0], Settings(lengths, 0.25, window, softcap, parents))
        assert largest.elements <= plain_attention._HELD


@native_only
def test_native_code_asks_for_memory_in_proportion_to_the_longest_document() -> None:
    needed = cpu_attention._library().nybble_attend_scratch
    growth = (needed(128, 20_000) - needed(128, 10_000)) / 10_000
    assert growth == 4 * 2 * 128 + 2 * 4 * 128  # bytes a token: four copies in bfloat16, two sums in float32
    assert needed(128, 10_000) < 32e6


def flash_like(*tensors: Tensor, max_q: int, max_k: int, scale: float, window_size: tuple[int, int]) -> Tensor:
    """What the documentation of torch.nn.attention.varlen says of query, key, value and ends, on a CPU."""
    query, key, value, ends, key_ends = tensors
    lengths, key_lengths = ends.diff().tolist(), key_ends.diff().tolist()
    assert ends.dtype == key_ends.dtype == torch.int32
    assert (max_q, max_k) == (max(lengths), max(key_lengths))
    left, right = window_size
    assert right == 0
    # The last query sees the last key, whatever the number of keys; here queries are put before that nobody reads.
    whole = [x.new_zeros(n, *x.shape[1:]) for x, n in zip(query.split(lengths), key_lengths, strict=True)]
    parts = zip(query.split(lengths), whole, strict=True)
    queries = torch.cat([torch.cat([nothing[len(part) :], part]) for part, nothing in parts])
    settings = Settings(key_lengths, scale, None if left == -1 else left + 1)
    out = SDPA.attend(queries, key, value, settings).split(key_lengths)
    return torch.cat([rows[len(rows) - n :] for rows, n in zip(out, lengths, strict=True)])


@pytest.mark.parametrize("path", [VARLEN, VARLEN_WINDOW, VARLEN_TREE])
def test_the_kernel_for_different_lengths_is_called_as_documented(
    path: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def recorded(*args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        settings = {"scale": scale, "window_size": window_size}
        calls.append((args, {**settings, "enable_gqa": enable_gqa}))
        return flash_like(*args[:5], max_q=args[5], max_k=args[6], **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(varlen, "varlen_attn", lambda: recorded)
    assert varlen.missing() is None
    assert self_test(path, CPU) is None
    assert len(calls) == {VARLEN: 2, VARLEN_WINDOW: 1, VARLEN_TREE: 4}[path]  # trees: again for the backward
    monkeypatch.undo()
    if varlen.missing() is None:
        for args, kwargs in calls:
            signature(varlen.varlen_attn()).bind(*args, **kwargs)


def test_a_kernel_of_other_arguments_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda: lambda query, is_causal: query)
    assert "takes no scale or window_size" in str(varlen.missing())


@pytest.fixture
def _untried() -> Iterator[None]:
    dispatcher.forget_faults()
    yield
    dispatcher.forget_faults()


def taken(settings: Settings) -> str:
    """The backend of attention that computes this for heads of 64 in bfloat16."""
    q = torch.empty(2, 1, 64, dtype=torch.bfloat16)
    backend = dispatcher.attention(CPU, lambda backend: backend.takes(q, settings))
    assert backend is not None
    return backend.NAME


USUAL = Settings((2,), 1.0)
WINDOW = Settings((2,), 1.0, window=1)
SOFTCAP = Settings((2,), 1.0, softcap=1.0)


@native_only
def test_the_fastest_backend_is_taken_and_says_so() -> None:
    assert {taken(settings) for settings in (USUAL, WINDOW, SOFTCAP)} == {"native"}
    assert dispatcher.choice("attend", CPU) == Choice("native")
    assert ops.implementation(torch.empty(1, 1, 64, dtype=torch.bfloat16), Settings((1,), 1.0)) is cpu_attention
    assert ops.implementation(torch.empty(1, 1, 64), Settings((1,), 1.0)) is plain_attention
    assert dispatcher.attention(torch.device("meta"), lambda _: True) is None


@native_only
def test_nothing_above_the_chosen_backend_is_taken() -> None:
    q = torch.empty(1, 1, 64, dtype=torch.bfloat16)
    dispatcher.choose(CPU, {"attend": Choice("sdpa", "as asked")})
    assert [taken(settings) for settings in (USUAL, WINDOW, SOFTCAP)] == ["sdpa", "sdpa", "torch"]
    assert ops.implementation(q, USUAL) is plain_attention
    dispatcher.choose(CPU, {"attend": Choice("torch", "as asked")})
    assert {taken(settings) for settings in (USUAL, WINDOW, SOFTCAP)} == {"torch"}
    assert ops.implementation(q, USUAL) is plain_attention


@native_only
@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("function", ["forward", "backward"])
def test_a_backend_of_other_numbers_is_not_taken(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(cpu_attention, function)

    def wrong(*arguments: Any) -> Any:
        results = right(*arguments)
        results[-1][-1] += 1
        return results

    monkeypatch.setattr(cpu_attention, function, wrong)
    assert [taken(settings) for settings in (USUAL, WINDOW, SOFTCAP)] == ["sdpa", "sdpa", "torch"]
    assert dispatcher.choice("attend", CPU).backend == "sdpa"
    assert "self-test of the native backend failed: " in (dispatcher.choice("attend", CPU).reason or "")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    (backend,) = dispatcher.named("attend", "sdpa", CPU)
    failing = replace(backend, load=lambda: SDPA._replace(derive=broken))
    assert Dispatcher().fault(failing, CPU) == "self-test of the sdpa backend failed: RuntimeError: no kernel image"
    monkeypatch.setattr(library, "unavailable", lambda: "no compiler")
    assert cpu_attention.unavailable.__wrapped__() == "no compiler"


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_call_may_come_inside_a_checkpoint_or_without_gradients(dtype: torch.dtype) -> None:
    inputs, grad = drawn(4, 2, 64)
    inputs, grad = tuple(x.to(dtype) for x in inputs), grad.to(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, LENGTHS, 0.125, use_reentrant=False)  # type: ignore[no-any-return]

    with torch.inference_mode():
        attend(*(x.clone() for x in inputs), LENGTHS, 0.125)
    dispatcher.forget_faults()
    ours, plain = differentiated(run, inputs, grad), differentiated(attend, inputs, grad, LENGTHS, 0.125)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.randn(6, 4, 16), torch.randn(6, 3, 16)
    with pytest.raises(ValueError, match=r"divisor of heads.*\(6, 3, 16\)"):
        attend(q, k, k, [6], 1.0)
    with pytest.raises(ValueError, match=r"one type and device, got torch\.float32, torch\.bfloat16"):
        torch.ops.nybble.attend(q, q.bfloat16(), q, [6], 1.0, None, 0.0)
    with pytest.raises(ValueError, match="sum to the 6 tokens, got 5 in 1"):
        attend(q, q, q, [5], 1.0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        attend(q, q, q, [6], 1.0, 0)
    for parents in ([0, -1], [-1, 1], [-1, -2]):
        with pytest.raises(ValueError, match="segments must be in pre-order: segment "):
            attend(q, q, q, [2, 4], 1.0, parents=parents)
    with pytest.raises(ValueError, match="segment 3 cannot continue segment 1"):
        attend(q, q, q, [2, 1, 2, 1], 1.0, parents=[-1, 0, 0, 1])
    with pytest.raises(ValueError, match="each segment needs tokens and a parent, got 2 lengths, 1 parents"):
        attend(q, q, q, [2, 4], 1.0, parents=[-1])
    with pytest.raises(ValueError, match="each segment needs tokens"):
        attend(q, q, q, [2, 0, 4], 1.0, parents=[-1, 0, 0])
    assert attend(q[:0], q[:0], q[:0], [], 1.0).shape == (0, 4, 16)
    assert torch.equal(attend(q, q, q, [2, 0, 4], 1.0), attend(q, q, q, [2, 4], 1.0))
