"""Every computing check passes here as it is, and fails when what it checks is broken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.diagnostics import checks, operators, rates
from nybble.diagnostics.children import Run, _one
from nybble.diagnostics.evidence import Result
from nybble.diagnostics.worker import _describe, answer
from nybble.kernels import dispatcher
from nybble.kernels.attention import torch as plain_attention
from nybble.kernels.attention.torch import Settings
from nybble.kernels.ops4bit import cpu
from nybble.kernels.ops4bit import torch as plain
from nybble.kernels.pointwise import cpu as cpu_rows
from nybble.kernels.pointwise import ops as pointwise
from nybble.kernels.pointwise import torch as plain_rows
from nybble.nn import linear4bit, lora_projection
from nybble.nn.lora_projection import Projection
from nybble.quant import PackedWeight, codebook, decode, dynamic_codebook, encode

CPU = torch.device("cpu")
Patch = pytest.MonkeyPatch
TABLE = {check.name: check for check in checks.CHECKS}
CASES = [
    (check.name, path)
    for check in checks.CHECKS
    for path in _describe(check, CPU)["paths"]
    if check.name != "bitsandbytes" or find_spec("bitsandbytes")
]


class InThisProcess:
    """Stands where a child process answers."""

    def ask(self, request: dict[str, str], _limit_seconds: float) -> dict[str, Any]:
        return answer(TABLE[request["check"]], CPU, request["path"])


def outcome(name: str, path: str) -> Result:
    run = Run(device={"type": "cpu"})
    _one(InThisProcess(), _describe(TABLE[name], CPU), path, run)  # type: ignore[arg-type]
    return run.results[0]


def _around(patch: Patch, place: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(right, *arguments)`."""
    right = getattr(place, name)
    patch.setattr(place, name, lambda *a, **k: change(right, *a, **k))


def _wrong_products(patch: Patch) -> None:
    def change(right: Any, a: Tensor, b: Tensor) -> Tensor:
        y = right(a, b)
        return y if y.dtype == torch.float64 else torch.zeros_like(y)

    _around(patch, torch.Tensor, "__matmul__", change)


def _swapped_nibbles(patch: Patch, path: Any) -> None:
    def change(right: Any, weight: PackedWeight, out: Tensor) -> None:
        right(replace(weight, packed=weight.packed >> 4 | weight.packed << 4), out)

    _around(patch, path, "dequantize", change)


def _next_codes(patch: Patch, path: Any) -> None:
    _around(patch, path, "nearest_codes", lambda right, *a: right(*a) ^ 0x10)


def _short_product(patch: Patch, path: Any) -> None:
    def change(right: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        return right(torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], dim=1), weight)

    _around(patch, path, "multiply", change)


def _shifted_weight(patch: Patch) -> None:
    _around(patch, linear4bit.Linear4bit, "decoded", lambda right, *a: right(*a).roll(1, 0))


def _transposed_lora(patch: Patch) -> None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.reshape(self.in_features, self.out_features).t(), self.bias)

    patch.setattr(nn.Linear, "forward", forward)


def _leaking_mask(patch: Patch) -> None:
    def change(right: Any, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        one_ahead = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(1)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~one_ahead, -torch.inf).softmax(-1) @ v

    _around(patch, functional, "scaled_dot_product_attention", change)


def _leaking_documents(patch: Patch, path: str) -> None:
    """Two documents are taken for one."""

    def joined(settings: Settings) -> Settings:
        first, second, *others = settings.lengths
        return settings._replace(lengths=(first + second, *others))

    if path == "torch":
        for name in ("forward", "backward"):
            _around(patch, plain_attention, name, lambda right, *a: right(*a[:-1], joined(a[-1])))
        return
    (backend,) = dispatcher.named("attend", path, CPU)
    right = backend.load()
    leaking = right._replace(derive=lambda inputs, grad, settings: right.derive(inputs, grad, joined(settings)))
    patch.setattr(dispatcher, "named", lambda *_: (replace(backend, load=lambda: leaking),))


def _transposed_adapter(patch: Patch) -> None:
    def change(right: Any, x: Tensor, p: Projection, *others: Any) -> Any:
        if p.adapter is None:
            return right(x, p, *others)
        a = p.adapter.a
        return right(x, replace(p, adapter=replace(p.adapter, a=a.reshape(a.t().shape).t())), *others)

    _around(patch, lora_projection, "product", change)


def _nan(patch: Patch) -> None:
    _around(patch, torch, "exp", lambda right, x: right(x) if x.dtype == torch.float64 else right(x) * torch.nan)


def _slow(patch: Patch) -> None:
    def change(right: Any, *arguments: Any) -> Any:
        time.sleep(0.2)
        return right(*arguments)

    _around(patch, rates, "dequantize", change)


def _no_room(patch: Patch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 256.00 MiB")

    patch.setattr(rates, "best_seconds", full)


def _gradient_upside_down(patch: Patch) -> None:
    right = lora_projection._Project.backward
    patch.setattr(
        lora_projection._Project, "backward", staticmethod(lambda ctx, *grads: right(ctx, *(-g for g in grads)))
    )


def _wrong_bytes(patch: Patch) -> None:
    _around(patch, import_module("bitsandbytes.functional"), "dequantize_4bit", lambda right, *a: right(*a) * torch.nan)


PATHS = {"native": cpu, "torch": plain}
ROWS = {"native": cpu_rows, "torch": plain_rows}
FAULTS: dict[str, Callable[[Patch, str], None]] = {
    "first kernel": lambda patch, _: _wrong_products(patch),
    "16-bit types": lambda patch, _: _nan(patch),
    "4-bit decode": lambda patch, path: _swapped_nibbles(patch, PATHS[path]),
    "4-bit encode": lambda patch, path: _next_codes(patch, PATHS[path]),
    "few-row product": lambda patch, path: _short_product(patch, PATHS[path]),
    "4-bit linear": lambda patch, _: _shifted_weight(patch),
    "PEFT's LoRA": lambda patch, _: _transposed_lora(patch),
    "row operators": lambda patch, path: _around(
        patch, ROWS[path], "dropout", lambda right, x, p, seed, out: right(x, p, seed + 1, out)
    ),
    "LoRA": lambda patch, _: _transposed_adapter(patch),
    "MLP": lambda patch, _: _around(
        patch,
        dispatcher.code("rows", torch.device("cpu")),
        "gated",
        lambda right, gate, up, kind: right(up, gate, kind),
    ),
    "torch's attention": lambda patch, _: _leaking_mask(patch),
    "attention of rows": lambda patch, path: _leaking_documents(patch, path),
    "loss": lambda patch, _: _around(
        patch, pointwise, "cross_entropy_", lambda right, logits, labels, cap: right(logits, labels.roll(1), cap)
    ),
    "AdamW": lambda patch, _: patch.setattr(torch.optim, "AdamW", torch.optim.Adam),
    "narrow products": lambda patch, _: _wrong_products(patch),
    "bitsandbytes": lambda patch, _: _wrong_bytes(patch),
    "speed of decoding": lambda patch, _: _slow(patch),
    "memory rate": lambda patch, _: _no_room(patch),
    "product rate": lambda patch, _: _no_room(patch),
    "20 steps": lambda patch, _: _gradient_upside_down(patch),
}


def test_every_check_has_a_fault() -> None:
    assert set(FAULTS) == set(TABLE)


@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_check_passes_here(name: str, path: str) -> None:
    result = outcome(name, path)
    if name == "speed of decoding":  # tests do not time
        assert result.max_error is not None
    else:
        assert result.ok, result.cause


@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_check_fails_when_what_it_checks_is_broken(name: str, path: str, monkeypatch: Patch) -> None:
    FAULTS[name](monkeypatch, path)
    result = outcome(name, path)
    assert not result.ok
    assert result.cause
    if result.tolerance is not None:
        assert result.fix
        assert result.symptom
        assert result.max_error is None or result.max_error > 2 * result.tolerance


def test_a_wrong_value_in_the_table_is_seen_by_either_path(monkeypatch: Patch) -> None:
    """The reference makes the tables itself, so that one shared by every path is still checked."""
    wrong = codebook("nf4").clone()
    wrong[3] += 0.001
    monkeypatch.setattr(plain, "codebook", lambda _: wrong)
    monkeypatch.setattr(plain, "_pair_table", plain._pair_table.__wrapped__)
    assert not outcome("4-bit decode", "torch").ok
    monkeypatch.setattr(cpu, "codebook", lambda _: wrong)
    tables = cpu._tables.__wrapped__("nf4")
    monkeypatch.setattr(cpu, "_tables", lambda _: tables)
    assert not outcome("4-bit decode", "native").ok


def test_a_kind_of_attention_that_torch_has_for_no_size_is_no_fault() -> None:
    """There is none of the memory-efficient kind on a CPU."""
    run = Run(device={"type": "cpu"})
    _one(InThisProcess(), _describe(TABLE["torch's attention"], CPU), "efficient", run)  # type: ignore[arg-type]
    assert run.results == []
    assert run.not_run == {"torch's attention (efficient)": "torch has no efficient attention on this device"}


def test_writing_past_the_end_is_seen(monkeypatch: Patch) -> None:
    def change(right: Any, weight: PackedWeight, out: Tensor) -> None:
        right(weight, out)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()

    _around(monkeypatch, plain, "dequantize", change)
    assert outcome("4-bit decode", "torch").max_error == float("inf")


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_a_scale_worse_than_the_usual_one_is_seen(kind: str, monkeypatch: Patch) -> None:
    _around(monkeypatch, PATHS[kind], "search_scales", lambda right, *a: right(*a) * 1.3)
    assert not outcome("4-bit encode", kind).ok


def test_the_tables_of_the_reference_are_the_formats() -> None:
    for made, ours in (
        (operators.nf4_values(), codebook("nf4")),
        (operators.fp4_values(), codebook("fp4")),
        (operators.dynamic_values(), dynamic_codebook()),
    ):
        assert (torch.tensor(made, dtype=torch.float64) - ours).abs().max() < 2e-7


def test_the_reference_decodes_a_block_worked_by_hand() -> None:
    packed = torch.tensor([[0xF2], [0x87]], dtype=torch.uint8)
    weight = PackedWeight(packed, torch.tensor([2.0]), (4,), 64, "nf4", torch.float32)
    expected = torch.tensor([2.0, -1.0501461, 0.1591606, 0.0], dtype=torch.float64)
    assert torch.allclose(operators.decode_exactly(weight), expected, atol=1e-6)


def test_the_reference_and_the_definition_agree_on_nested_scales() -> None:
    weight = encode(torch.randn(300, 64), "nf4", 32)
    assert torch.allclose(operators.decode_exactly(weight).float(), decode(weight, torch.float32), atol=1e-6)
