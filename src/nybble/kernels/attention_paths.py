"""Which code computes attention on a device: the paths, fastest first, each taken where it was seen to work.

    varlen   GPU: one kernel over all documents, float16 or bfloat16 (torch >= 2.12)
    native   CPU: compiled code for AVX512-BF16
    sdpa     torch's own attention, a call for each document or run of documents of equal length

A path is tried once for each kind of device, forward and backward, against float64. What no path takes, the operator
`nybble::attend` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby, takewhile
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nybble.kernels import cpu_attention, plain_attention
from nybble.kernels.plain_attention import Settings

__all__ = ["implementation", "ladder", "path_reasons", "paths_taken", "self_test"]

# Largest error of any element of the result or a gradient, as a share of the largest magnitude in it.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


Tensors = tuple[Tensor, ...]
Attend = Callable[[Tensor, Tensor, Tensor, Settings], Tensor]  # of q, k and v


class Path(NamedTuple):
    """One way to compute attention."""

    NAME: str
    unavailable: Callable[[], str | None]  # why it cannot run here, in words; None if it can be tried
    takes: Callable[[Tensor, Tensor, Settings], bool]  # whether it computes this; of q and k
    attend: Attend
    derive: Callable[[Tensors, Tensor, Settings], Tensors]  # result and gradients, of q, k, v and the result's gradient


def _by_operator(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    out: Tensor = torch.ops.nybble.attend(q, k, v, *settings)[0]
    return out


def _derive_native(inputs: Tensors, grad: Tensor, settings: Settings) -> Tensors:
    q, k, v = inputs
    out, lse = cpu_attention.forward(q, k, v, settings)
    return out, *cpu_attention.backward(grad, (q, k, v, out, lse), settings)


def _derive_by_autograd(attend: Attend) -> Callable[[Tensors, Tensor, Settings], Tensors]:
    def derive(inputs: Tensors, grad: Tensor, settings: Settings) -> Tensors:
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        out = attend(q, k, v, settings)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)

    return derive


def _per_document(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """torch's attention per document; documents of equal length that follow each other go together."""
    window, pieces = settings.window, []
    runs = [(length, len(list(same))) for length, same in groupby(settings.lengths)]
    sizes = [length * n for length, n in runs]
    # `split`, not slices: its backward is one concatenation, theirs a tensor of T zeros each.
    for (length, n), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        if window is not None and window < length:
            pieces.append(torch.ops.nybble.attend(*parts, [length] * n, *settings[1:])[0])
            continue
        queries, keys, values = (part.unflatten(0, (n, length)).transpose(1, 2) for part in parts)
        if not _shares_keys(queries, keys, values):
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        scaling = {"is_causal": True, "scale": settings.scale, "enable_gqa": keys.shape[1] != q.shape[1]}
        result = scaled_dot_product_attention(queries, keys, values, **scaling)
        pieces.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()


def _shares_keys(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads of q that share keys keep the fast kernel."""
    if q.device.type != "cuda" or q.shape[1] == k.shape[1]:
        return True
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


NATIVE = Path(
    cpu_attention.NAME,
    cpu_attention.unavailable,
    lambda q, k, settings: cpu_attention.takes(q, settings),
    _by_operator,
    _derive_native,
)
SDPA = Path(
    "sdpa",
    lambda: None,
    lambda q, k, settings: not settings.softcap,
    _per_document,
    _derive_by_autograd(_per_document),
)
_PATHS = {"cpu": (NATIVE, SDPA), "cuda": (SDPA,)}


def implementation(q: Tensor, settings: Settings) -> ModuleType:
    """What runs the operator `nybble::attend` and its backward: `cpu_attention` or `plain_attention`."""
    native = q.device.type == "cpu" and cpu_attention.takes(q, settings) and _fault(NATIVE, "cpu") is None
    return cpu_attention if native else plain_attention


@cache
def ladder(kind: str) -> tuple[Path, ...]:
    """The paths that work on this kind of device, fastest first."""
    return tuple(path for path in _PATHS.get(kind, ()) if _fault(path, kind) is None)


def paths_taken(device: torch.device) -> dict[str, str]:
    """Operator -> name of the fastest path that works on `device`."""
    return {"attend": next((path.NAME for path in ladder(device.type)), plain_attention.NAME)}


def path_reasons(device: torch.device) -> dict[str, str]:
    """Operator -> why the faster paths of this kind of device are not taken; empty where the fastest is."""
    above = takewhile(lambda path: path not in ladder(device.type), _PATHS.get(device.type, ()))
    reason = "; ".join(f"{path.NAME}: {_fault(path, device.type)}" for path in above)
    return {"attend": reason} if reason else {}


@cache
def _fault(path: Path, kind: str) -> str | None:
    """Why a path cannot be taken, in words."""
    missing = path.unavailable()
    if missing:
        return missing
    # In a thread of its own: hooks on saved tensors, modes and `no_grad` of the caller do not reach there.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(self_test, path, torch.device(kind)).result()


def self_test(path: Path, device: torch.device) -> str | None:
    """What is wrong with `path` on `device`, in words; None if result and gradients are near those of float64."""
    try:
        for heads, width, window in ((4, 64, None), (2, 128, None), (4, 64, 7)):
            wrong = _wrong(path, device, heads, width, window)
            if wrong:
                return f"self-test failed: {wrong}"
    except Exception as error:  # noqa: BLE001 - a driver or kernel may fail in any way; the next path then runs
        return f"self-test failed: {type(error).__name__}: {error}"
    return None


def _wrong(path: Path, device: torch.device, heads: int, width: int, window: int | None) -> str | None:
    """What is too far from float64: documents of several lengths, two heads of q for each of k."""
    settings = Settings((5, 1, 33, 33, 70), width**-0.5, window)
    n = sum(settings.lengths)
    flat = torch.sin(torch.arange(6 * heads * n * width, dtype=torch.float32, device="cpu") ** 1.5).bfloat16()
    q, grad, k, v = flat.view(n, 6 * heads, width).split([2 * heads, 2 * heads, heads, heads], 1)
    inputs = tuple(x.to(device) for x in (q, k, v))
    if not path.takes(inputs[0], inputs[1], settings):
        return None
    results = path.derive(inputs, grad.to(device), settings)
    exact = (q.double(), k.double(), v.double())
    saved = exact + plain_attention.forward(*exact, settings)
    wanted = (saved[3], *plain_attention.backward(grad.double(), saved, settings))
    for name, ours, theirs in zip(("result", "dq", "dk", "dv"), results, wanted, strict=True):
        error = ((ours.cpu().double() - theirs).abs().max() / theirs.abs().max()).item()
        if not error <= TOLERANCES[ours.dtype]:
            return f"{name} is off by {error:.1e} of its largest value, {TOLERANCES[ours.dtype]:.0e} is allowed"
    return None
