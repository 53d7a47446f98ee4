"""Which code computes attention on a device: the paths, fastest first, each taken where it was seen to work.

    varlen   GPU: one kernel over all documents, float16 or bfloat16, where torch has it
    native   CPU: compiled code for AVX512-BF16
    sdpa     torch's own attention, a call for each document or run of documents of equal length

A path is tried once for each kind of device, forward and backward, against float64. What no path takes, the operator
`nybble::attend` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from inspect import signature
from itertools import accumulate, dropwhile, groupby
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nybble.kernels import cpu_attention, plain_attention
from nybble.kernels.choices import taken
from nybble.kernels.plain_attention import Settings

__all__ = ["implementation", "ladder", "path_reasons", "paths_named", "paths_taken", "self_test"]

# Largest error of any element of the result or a gradient, as a share of the largest magnitude in it.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


Tensors = tuple[Tensor, ...]
Attend = Callable[[Tensor, Tensor, Tensor, Settings], Tensor]  # of q, k and v


class Path(NamedTuple):
    """One way to compute attention."""

    NAME: str
    unavailable: Callable[[], str | None]  # why it cannot run here, in words; None if it can be tried
    takes: Callable[[Tensor, Settings], bool]  # whether it computes this; of q
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


def _varlen_missing() -> str | None:
    try:
        taken = signature(_varlen_attn()).parameters
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    missing = {"scale", "window_size"} - taken.keys()
    return f"varlen_attn of torch {torch.__version__} takes no {' or '.join(sorted(missing))}" if missing else None


def _varlen_attn() -> Callable[..., Tensor]:
    from torch.nn.attention import varlen  # not in every torch; it registers operators when it is imported

    return cast(Callable[..., Tensor], varlen.varlen_attn)


def _varlen_takes(q: Tensor, settings: Settings) -> bool:
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return fits and not settings.softcap


def _at_once(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """One call of torch's kernel for sequences of different lengths."""
    function = _varlen_attn()
    ends, longest = _ends(tuple(settings.lengths), q.device), max(settings.lengths)
    # It counts the tokens before, and takes (-1, 0) for causal. Before `enable_gqa` heads could share keys unasked.
    window = (-1 if settings.window is None else settings.window - 1, 0)
    sharing = {"enable_gqa": True} if "enable_gqa" in signature(function).parameters else {}
    out = function(q, k, v, ends, ends, longest, longest, scale=settings.scale, window_size=window, **sharing)
    return out.contiguous()


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0 and the end of each document, int32 on `device`, sent from pinned memory: nothing waits for the device."""
    with torch.inference_mode(False):  # a later step may save it for its backward
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends.to(device)


def _shares_keys(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads of q that share keys keep the fast kernel."""
    if q.device.type != "cuda" or q.shape[1] == k.shape[1]:
        return True
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


NATIVE = Path(cpu_attention.NAME, cpu_attention.unavailable, cpu_attention.takes, _by_operator, _derive_native)
# Windows apart: where only they are wrong, the rest stays fast.
VARLEN, VARLEN_WINDOW = (
    Path("varlen", _varlen_missing, takes, _at_once, _derive_by_autograd(_at_once))
    for takes in (
        lambda q, settings: settings.window is None and _varlen_takes(q, settings),
        lambda q, settings: settings.window is not None and _varlen_takes(q, settings),
    )
)
SDPA = Path(
    "sdpa",
    lambda: None,
    lambda q, settings: not settings.softcap,
    _per_document,
    _derive_by_autograd(_per_document),
)
_PATHS = {"cpu": (NATIVE, SDPA), "cuda": (VARLEN, VARLEN_WINDOW, SDPA)}
_CASES = {
    "attend": Settings((2,), 1.0),
    "attend_window": Settings((2,), 1.0, window=1),
    "attend_softcap": Settings((2,), 1.0, softcap=1.0),
}


def implementation(q: Tensor, settings: Settings) -> ModuleType:
    """What runs the operator `nybble::attend` and its backward: `cpu_attention` or `plain_attention`."""
    if q.device.type != "cpu" or not cpu_attention.takes(q, settings):
        return plain_attention
    chosen = taken("attend", q.device)
    # Not `ladder`: the tests of other paths, which it awaits, come by here.
    native = chosen.path == NATIVE.NAME if chosen else _fault(NATIVE, "cpu") is None
    return cpu_attention if native else plain_attention


def ladder(kind: str) -> tuple[Path, ...]:
    """The paths that work on this kind of device, fastest first; none above the chosen one."""
    chosen = taken("attend", torch.device(kind))
    if chosen is None:
        return _sound(kind)
    paths = _PATHS.get(kind, ())
    below = dropwhile(lambda path: chosen.path != path.NAME, paths)
    return tuple(path for path in below if chosen.path == path.NAME or _fault(path, kind) is None)


@cache
def _sound(kind: str) -> tuple[Path, ...]:
    return tuple(path for path in _PATHS.get(kind, ()) if _fault(path, kind) is None)


def paths_named(kind: str, name: str) -> tuple[Path, ...]:
    """What goes by this name on this kind of device; nothing for plain torch, which stands behind them all."""
    return tuple(path for path in _PATHS.get(kind, ()) if name == path.NAME)


def paths_taken(device: torch.device) -> dict[str, str]:
    """`attend` with neither, with a window, with a cap on scores -> the path of 16-bit tensors on `device`."""
    return {case: _sought(settings, device.type)[0] for case, settings in _CASES.items()}


def path_reasons(device: torch.device) -> dict[str, str]:
    """The same -> why faster paths are not taken; empty where the fastest is."""
    reasons = {case: _sought(settings, device.type)[1] for case, settings in _CASES.items()}
    return {case: "; ".join(reason) for case, reason in reasons.items() if reason}


def _sought(settings: Settings, kind: str) -> tuple[str, list[str]]:
    """Name of the path for heads of 64 in bfloat16, and what is wrong with those above it."""
    q = torch.empty(2, 1, 64, dtype=torch.bfloat16, device="cpu")
    chosen, wrong = taken("attend", torch.device(kind)), list[str]()
    for path in _PATHS.get(kind, ()):
        if path.takes(q, settings):
            if path in ladder(kind):
                return path.NAME, wrong
            reason = chosen.reason if chosen else f"{path.NAME}: {_fault(path, kind)}"
            wrong += [reason] if reason and reason not in wrong else []
    return plain_attention.NAME, wrong


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
        for width, window, softcap in ((64, None, 0.0), (128, None, 0.0), (64, 7, 0.0), (64, None, 2.0)):
            wrong = _wrong(path, device, width, Settings((5, 1, 33, 33, 70), width**-0.5, window, softcap))
            if wrong:
                return f"self-test failed: {wrong}"
    except Exception as error:  # noqa: BLE001 - a driver or kernel may fail in any way; the next path then runs
        return f"self-test failed: {type(error).__name__}: {str(error)[:200]}"
    return None


def _wrong(path: Path, device: torch.device, width: int, settings: Settings) -> str | None:
    """What is too far from float64, with four heads of q on two of k."""
    n = sum(settings.lengths)
    flat = torch.sin(torch.arange(12 * n * width, dtype=torch.float32, device="cpu") ** 1.5).bfloat16()
    q, grad, k, v = flat.view(n, 12, width).split([4, 4, 2, 2], 1)
    inputs = tuple(x.to(device) for x in (q, k, v))
    if not path.takes(inputs[0], settings):
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
