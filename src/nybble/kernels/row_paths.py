"""Which code runs the row operators on a device: the fastest path that has been seen to give right results on it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from nybble.kernels import cpu, cpu_rows, plain_rows
from nybble.kernels.choices import ladder, taken

OPERATORS = (
    "rms_norm",
    "rms_norm_backward",
    "gated",
    "gated_backward_",
    "dropout",
    "dropout_add_",
    "cross_entropy_",
    "rope",
    "glance",
)
# What a path may differ by from the plain one in the self-test, of 1 + |result|: two places of 16-bit types, 16 of
# float32, whose sums of 67 are in another order. Dropout must have the bits.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class RowPath(Protocol):
    """What a path must offer; `nybble.kernels.plain_rows` says what each result must be.

    Activations are float32, float16 or bfloat16, all of one type, contiguous (x of `rope` only within its heads), and
    there is at least one.
    """

    NAME: str  # as run.json shows it

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
        """x / rms(x) times weight, and 1 / rms(x) `(n,) float32`."""

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, one_plus: bool) -> Tensor:
        """dL/dx."""

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """activation(gate) * up."""

    def gated_backward_(self, grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
        """In place: the product, and the gradients of gate and up."""

    def dropout(self, x: Tensor, p: float, seed: int, out: Tensor) -> None:
        """x with elements zeroed, into out."""

    def dropout_add_(self, total: Tensor, x: Tensor, p: float, seed: int) -> None:
        """total += dropout(x)."""

    def cross_entropy_(self, logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
        """Loss of each row `(n,) float32`; logits become their gradients."""

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        """x turned to its positions, or back."""

    def glance(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one token to the cached ones; k and v may lie in strides."""


def path_for(device: torch.device) -> RowPath:
    """The path that the row operators take on `device`."""
    chosen = taken("rows", device)
    return path_named(chosen.path) if chosen else _path_of_kind(device.type)[0]


def path_named(name: str) -> RowPath:
    """The code of a path.

    Raises:
        ImportError: it is not here.
    """
    if name == "triton":
        return cast(RowPath, import_module("nybble.kernels.gpu_rows"))
    return cast(RowPath, {"native": cpu_rows, "torch": plain_rows}[name])


def unavailable(name: str) -> str | None:
    """Why a path cannot be tried, in words; None if it can."""
    if name == "native":
        return cpu.unavailable()
    return "triton is not installed" if name == "triton" and not find_spec("triton") else None


def paths_taken(device: torch.device) -> dict[str, str]:
    """Operator -> name of the path that it takes on `device`."""
    return dict.fromkeys(OPERATORS, path_for(device).NAME)


def path_reasons(device: torch.device) -> dict[str, str]:
    """Operator -> why it does not take the fast path of `device`; empty where it does."""
    chosen = taken("rows", device)
    reason = chosen.reason if chosen else _path_of_kind(device.type)[1]
    return dict.fromkeys(OPERATORS, reason) if reason else {}


@cache
def _path_of_kind(kind: str) -> tuple[RowPath, str | None]:
    """The path, and why it is not the fast one of this kind of device, in words."""
    device = torch.device(kind)
    names = ladder("rows", device)
    if not names:
        return cast(RowPath, plain_rows), f"there is no fast path for {kind}"
    missing = unavailable(names[0])
    wrong = missing or self_test(path_named(names[0]), device)
    return path_named("torch" if wrong else names[0]), wrong


def self_test(path: RowPath, device: torch.device) -> str | None:
    """What is wrong with `path` on `device`, in words; None if it gives the plain one's results (see TOLERANCES)."""
    # In a thread of its own: autocast and other modes of the caller, such as a training step, do not reach there.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_self_test, path, device).result()


def _self_test(path: RowPath, device: torch.device) -> str | None:
    plainest = cast(RowPath, plain_rows)
    try:
        for dtype, tolerance in TOLERANCES.items():
            pairs = zip(_results(path, dtype, device), _results(plainest, dtype, device), strict=True)
            for (name, ours), (_, theirs) in pairs:
                allowed = 0.0 if name.startswith("dropout") else tolerance
                wide = theirs.double()
                if not bool(((ours.double() - wide).abs() <= allowed * (1 + wide.abs())).all()):
                    return f"self-test of the {path.NAME} path failed: {name} in {dtype} differs from the plain path"
    except Exception as error:  # noqa: BLE001 - a compiler or driver may fail in any way; the plain path then runs
        return f"self-test of the {path.NAME} path failed: {type(error).__name__}: {error}"
    return None


def _results(path: RowPath, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Each operator's results on a few rows of an odd width, with the operator's name."""
    drawn = torch.sin(torch.arange(4 * 5 * 67, dtype=torch.float32, device="cpu") ** 1.5)
    x, y, z, weight = (3 * drawn).to(device, dtype).view(4, 5, 67).unbind()
    labels = torch.tensor([0, 66, 5, 31, 32], device=device)
    for one_plus in (False, True):
        normed, rstd = path.rms_norm(x, weight[0], 1e-6, one_plus)
        yield "rms_norm", normed
        yield "rms_norm", rstd
        rstd = plain_rows.rms_norm(x, weight[0], 1e-6, one_plus)[1]
        yield "rms_norm_backward", path.rms_norm_backward(y, x, weight[0], rstd, one_plus)
    for activation in ("silu", "gelu_tanh"):
        yield "gated", path.gated(x, y, activation)
        changed = (z.clone(), x.clone(), y.clone())
        path.gated_backward_(*changed, activation)
        yield from (("gated_backward_", result) for result in changed)
    dropped, total = torch.empty_like(x), y.clone()
    path.dropout(x, 0.3, 7, dropped)
    path.dropout_add_(total, x, 0.3, -7)
    yield "dropout", dropped
    yield "dropout_add_", total
    for softcap in (0.0, 5.0):
        logits = x.clone()
        yield "cross_entropy_", path.cross_entropy_(logits, labels, softcap)
        yield "cross_entropy_", logits
    for inverse in (False, True):
        yield "rope", path.rope(x[:, :66].view(5, 3, 22), y[:, :14].float(), z[:, :14].float(), inverse)
    keys, values = (t[:, :60].reshape(5, 6, 2, 5).transpose(1, 2) for t in (y, z))
    yield "glance", path.glance(x[:, :20].contiguous().view(5, 4, 5), keys, values, 0.5)
