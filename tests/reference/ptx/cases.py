"""Every Triton kernel, by its own launch code, against plain torch or float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.kernels.ops4bit import triton as ops4bit
from nybble.kernels.ops4bit.torch import LowRank
from nybble.kernels.pointwise import torch as plain
from nybble.kernels.pointwise import triton as pointwise
from nybble.quant import decode, encode
from nybble.quant.search import nearest_codes, nest_scales, nested_codes, search_scales

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Largest difference, relative to the largest value: for 16 bits two units in the last place.
TOLERANCES = {"bfloat16": 1.6e-2, "float16": 2e-3, "float32": 3e-6}
SHAPES = ((3, 67), (2, 2048))
ENCODED = ((64 * 21 + 37, 64), (128 * 9, 128), (4096 * 2 + 5, 4096))  # numbers and block size


@dataclass(frozen=True)
class Case:
    """One call. `compare` returns pairs of what the kernel gave and what is right."""

    kernel: str
    kind: str  # of TYPES
    about: str
    compare: Callable[[], list[tuple[Tensor, Tensor]]]
    is_exact: bool = False

    def error(self) -> float:
        """The largest relative difference; of an exact operator 1 if one bit differs."""
        pairs = self.compare()
        if self.is_exact:
            return float(not all(torch.equal(got, right) for got, right in pairs))
        return max(_difference(got.double(), right.double()) for got, right in pairs)

    def is_wrong(self, error: float) -> bool:
        """Whether the error is more than rounding."""
        return not error <= (0 if self.is_exact else TOLERANCES[self.kind])


def _difference(got: Tensor, right: Tensor) -> float:
    if not torch.equal(got.isnan(), right.isnan()):
        return float("inf")
    return float((got - right).abs().max() / right.abs().max().clamp(min=1e-30))


class Numbers:
    """Random tensors of one type, the same every time."""

    def __init__(self, kind: str) -> None:
        self.dtype = TYPES[kind]
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype or self.dtype)


def every_case(kind: str) -> Iterator[Case]:
    """All cases of one type."""
    for make in (_norms, _gated, _dropout, _cross_entropy, _rope, _decoder, _products, _encoder):
        yield from make(kind, Numbers(kind))


def _norms(kind: str, numbers: Numbers) -> Iterator[Case]:
    for n, width in ((3, 67), (2, 128), (2, 4096)):
        x, grad, weight = numbers(n, width), numbers(n, width), numbers(width)
        for offset in (False, True):
            rstd = plain.rms_norm(x, weight, 1e-6, offset)[1]
            about = f"{n}x{width} unit_offset={offset}"

            def forward(x: Tensor = x, weight: Tensor = weight, offset: bool = offset) -> list[tuple[Tensor, Tensor]]:
                args = (x, weight, 1e-6, offset)
                return list(zip(pointwise.rms_norm(*args), plain.rms_norm(*args), strict=True))

            yield Case("rms_norm", kind, about, forward)
            backward = partial(_both, "rms_norm_backward", grad, x, weight, rstd, offset)
            yield Case("rms_norm_backward", kind, about, backward)


def _both(name: str, *arguments: Any) -> list[tuple[Tensor, Tensor]]:
    return [(getattr(pointwise, name)(*arguments), getattr(plain, name)(*arguments))]


def _both_in_place(name: str, tensors: list[Tensor], *arguments: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors after each has worked on copies of them, and what it returned."""
    results = []
    for module in (pointwise, plain):
        copies = [tensor.clone() for tensor in tensors]
        returned = getattr(module, name)(*copies, *arguments)
        results.append([*copies, *([] if returned is None else [returned])])
    return list(zip(*results, strict=True))


def _gated(kind: str, numbers: Numbers) -> Iterator[Case]:
    for shape in SHAPES:
        gate, up, grad = (numbers(*shape) * 3 for _ in range(3))
        for activation in ("silu", "gelu_tanh"):
            about = f"{shape} {activation}"
            yield Case("gated", kind, about, partial(_both, "gated", gate, up, activation))
            backward = partial(_both_in_place, "gated_backward_", [grad, gate, up], activation)
            yield Case("gated_backward", kind, about, backward)


def _dropout(kind: str, numbers: Numbers) -> Iterator[Case]:
    for shape in SHAPES:
        x, total = numbers(*shape) * 3, numbers(*shape)
        for p, seed in ((0.1, 7), (0.5, -3), (0.05, 2**31 + 5)):

            def dropped(x: Tensor = x, p: float = p, seed: int = seed) -> list[tuple[Tensor, Tensor]]:
                results = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
                for module, out in zip((pointwise, plain), results, strict=True):
                    module.dropout(x, p, seed, out)
                return [results]

            def added(
                x: Tensor = x, total: Tensor = total, p: float = p, seed: int = seed
            ) -> list[tuple[Tensor, Tensor]]:
                results = total.clone(), total.clone()
                for module, out in zip((pointwise, plain), results, strict=True):
                    module.dropout_add_(out, x, p, seed)
                return [results]

            yield Case("dropout", kind, f"{shape} {p}", dropped, is_exact=True)
            yield Case("dropout", kind, f"{shape} {p} added", added, is_exact=True)


def _cross_entropy(kind: str, numbers: Numbers) -> Iterator[Case]:
    for n, width in ((2, 131), (2, 2048), (1, 5000)):
        logits, labels = numbers(n, width) * 4, torch.tensor([(7 * i + width // 2) % width for i in range(n)])
        for softcap in (0.0, 5.0):
            compare = partial(_both_in_place, "cross_entropy_", [logits, labels], softcap)
            yield Case("cross_entropy", kind, f"{n}x{width} softcap={softcap}", compare)


def _rope(kind: str, numbers: Numbers) -> Iterator[Case]:
    for heads, width, rotated in ((4, 128, 128), (3, 22, 14), (8, 64, 64)):
        x, cos, sin = numbers(3, heads, width), numbers(3, rotated), numbers(3, rotated)
        for inverse in (False, True):
            about = f"{heads}x{width} rotated={rotated} inverse={inverse}"
            yield Case("rope", kind, about, partial(_both, "rope", x, cos, sin, inverse))
    strided, turn = numbers(3, 12, 64)[:, 2:10], numbers(3, 64)
    yield Case("rope", kind, "strided", partial(_both, "rope", strided, turn, turn, False))


def _decoder(kind: str, numbers: Numbers) -> Iterator[Case]:
    sizes = (("nf4", 8192 + 1024 + 16), ("nf4", 1), ("nf4", 31), ("nf4", 64), ("fp4", 37 * 53), ("fp4", 8193))
    for quant_type, n in sizes:
        for nested in (True, False):
            weight = encode(numbers(n, dtype=torch.float32) * 3, quant_type, 64 if n > 31 else 32, nested)

            def decoded(weight: Any = weight, n: int = n) -> list[tuple[Tensor, Tensor]]:
                out = torch.full((n,), 7.0, dtype=numbers.dtype)
                ops4bit.dequantize(weight, out)
                return [(out, decode(weight, numbers.dtype).view(-1))]

            yield Case("dequantize", kind, f"{quant_type} n={n} nested={nested}", decoded, is_exact=True)


def _products(kind: str, numbers: Numbers) -> Iterator[Case]:
    for rows, k, n in ((1, 256, 21), (3, 256, 8), (8, 250, 10), (1, 2050, 5), (2, 4096, 4)):
        weight, x = encode(numbers(n, k, dtype=torch.float32)), numbers(rows, k)
        low_rank = LowRank(numbers(5, k, dtype=torch.float32), numbers(n, 5, dtype=torch.float32), 0.5)
        for added in (None, low_rank) if kind == "float32" and rows == 3 else (None,):

            def product(weight: Any = weight, x: Tensor = x, added: Any = added) -> list[tuple[Tensor, Tensor]]:
                dense = decode(weight, torch.float32).double()
                if added is not None:
                    dense = dense + added.scaling * added.b.double() @ added.a.double()
                return [(ops4bit.multiply(x, weight, added), x.double() @ dense.t())]

            yield Case("gemv", kind, f"{rows}x{k}x{n}{' with an adapter' if added else ''}", product)


def _encoder(kind: str, numbers: Numbers) -> Iterator[Case]:
    for quant_type in ("nf4", "fp4"):
        for n, block_size in ENCODED[: 3 if (kind, quant_type) == ("bfloat16", "nf4") else 1]:
            flat = numbers(n) * 2
            scales = search_scales(flat, quant_type, block_size, True)
            first = (flat, quant_type, block_size)
            nested = (*first, scales, *nest_scales(scales))
            about = f"{quant_type} n={n} block={block_size}"
            for name, right, arguments in (
                ("search_scales", search_scales, (*first, True)),
                ("nested_codes", nested_codes, nested),
                ("nearest_codes", nearest_codes, (*first, scales)),
            ):
                compare = partial(_encoded, name, right, arguments)
                yield Case(name, kind, about, compare, is_exact=True)


def _encoded(name: str, right: Callable[..., Tensor], arguments: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(getattr(ops4bit, name)(*arguments), right(*arguments))]
