"""Which code runs an operator on a device: one table of backends, and the choice among them.

    operator          what it computes                                CPU                  GPU
    dequantize_4bit   packed weight -> numbers                        native, torch        triton, torch
    gemv_4bit         x W^T for a few rows of x, straight from codes  native, torch        triton, torch
    quantize_4bit     numbers -> packed weight                        native, torch        triton, torch
    rows              what happens between the products of a step     native, torch        triton, torch
    attend            attention over documents of a flattened batch   native, sdpa, torch  varlen, sdpa, torch
    linear_attention  states and short convolutions over documents    native, torch
    sdpa              kernel of torch's scaled_dot_product_attention  flash, math          flash, efficient, math
    gemm              library of torch's own products (ROCm)                               hipblaslt, rocblas

Backends are listed fastest first. An operator takes the first one that is available and passes its self-test on the
device in this process; `torch`, the definition of correct, needs no test. A choice from outside (`Dispatcher.choose`:
what the doctor found in processes of its own, or what the user asked for) comes before that: nothing above the chosen
backend is taken, and the chosen one is not tested again. Inputs that a backend does not take go to the next one.

`sdpa` and `gemm` are switches of torch itself. They apply within `Dispatcher.torch_settings` only, so that a call of
this library leaves torch as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nybble.kernels import library
from nybble.kernels.attention import cpu as attention_cpu
from nybble.kernels.attention import sdpa, varlen
from nybble.kernels.attention import self_test as attention_test
from nybble.kernels.attention.backend import TORCH, AttentionBackend
from nybble.kernels.linear_attention import cpu as linear_attention_cpu
from nybble.kernels.linear_attention import self_test as linear_attention_test
from nybble.kernels.linear_attention import torch as linear_attention_torch
from nybble.kernels.ops4bit import cpu as ops4bit_cpu
from nybble.kernels.ops4bit import self_test as ops4bit_test
from nybble.kernels.ops4bit import torch as ops4bit_torch
from nybble.kernels.pointwise import cpu as pointwise_cpu
from nybble.kernels.pointwise import self_test as pointwise_test
from nybble.kernels.pointwise import torch as pointwise_torch

__all__ = ["REFERENCE", "TABLE", "Backend", "Choice", "Dispatcher", "Operator", "device_kind", "dispatcher"]

REFERENCE = "torch"


@dataclass(frozen=True)
class Backend:
    """One way to run an operator."""

    name: str  # as run.json shows it
    load: Callable[[], Any]  # its code, which may have to be imported first
    unavailable: Callable[[], str | None]  # why it cannot be tried, in words; None if it can
    test: Callable[[Any, torch.device], str | None]  # what is wrong with the code on a device, in words


@dataclass(frozen=True)
class Operator:
    """The backends of an operator; a kind of device that offers no choice is absent."""

    backends: Mapping[str, tuple[Backend, ...]] = field(default_factory=dict)  # kind of device -> fastest first


@dataclass(frozen=True)
class Choice:
    """The backend of an operator, and why no faster one."""

    backend: str
    reason: str | None = None  # in words; None for the fastest backend


def _always() -> None:
    return None


def _family(
    native: Any, triton: str, reference: Any, test: Callable[[Any, torch.device], str | None]
) -> dict[str, tuple[Backend, ...]]:
    """The backends of operators whose family has a module for native code, for Triton and for torch."""
    in_c = Backend("native", lambda: native, lambda: library.unavailable(), test)
    in_triton = Backend("triton", lambda: import_module(triton), _triton_missing, _twice(test))
    in_torch = Backend(REFERENCE, lambda: reference, _always, test)
    return {"cpu": (in_c, in_torch), "cuda": (in_triton, in_torch), "hip": (in_triton, in_torch)}


def _twice(test: Callable[[Any, torch.device], str | None]) -> Callable[[Any, torch.device], str | None]:
    """A kernel's first launch goes through Triton and the later ones do not (triton_launch): both must be right."""
    return lambda code, device: test(code, device) or test(code, device)


def _ops4bit(test: Callable[[Any, torch.device], str | None]) -> Operator:
    return Operator(_family(ops4bit_cpu, "nybble.kernels.ops4bit.triton", ops4bit_torch, test))


def _triton_missing() -> str | None:
    return None if find_spec("triton") else "triton is not installed"


def _attention(code: AttentionBackend) -> Backend:
    return Backend(code.NAME, lambda: code, code.unavailable, attention_test.self_test)


def _switch(*names: str) -> tuple[Backend, ...]:
    """Settings of torch: there is nothing to load, and the doctor alone tests them."""
    return tuple(Backend(name, _always, _always, lambda _code, _device: None) for name in names)


_IN_TORCH = (_attention(sdpa.SDPA), _attention(TORCH))
# Windows and trees apart: where only they are wrong, the rest stays fast.
_VARLEN = (*(_attention(part) for part in (varlen.VARLEN, varlen.VARLEN_WINDOW, varlen.VARLEN_TREE)), *_IN_TORCH)
_SDPA_ON_GPUS = _switch("flash", "efficient", "math")
TABLE: dict[str, Operator] = {
    "dequantize_4bit": _ops4bit(ops4bit_test.decoding_differs),
    "gemv_4bit": _ops4bit(ops4bit_test.product_differs),
    "quantize_4bit": _ops4bit(ops4bit_test.encoding_differs),
    "rows": Operator(
        _family(pointwise_cpu, "nybble.kernels.pointwise.triton", pointwise_torch, pointwise_test.self_test)
    ),
    "attend": Operator({"cpu": (_attention(attention_cpu.NATIVE), *_IN_TORCH), "cuda": _VARLEN, "hip": _VARLEN}),
    "linear_attention": Operator(
        {
            "cpu": (
                Backend("native", lambda: linear_attention_cpu, library.unavailable, linear_attention_test.self_test),
                Backend(REFERENCE, lambda: linear_attention_torch, _always, linear_attention_test.self_test),
            )
        }
    ),
    # The fastest kernel that torch may take; inputs that do not suit it go to a later one.
    "sdpa": Operator({"cpu": _switch("flash", "math"), "cuda": _SDPA_ON_GPUS, "hip": _SDPA_ON_GPUS}),
    "gemm": Operator({"hip": _switch("hipblaslt", "rocblas")}),
}
_SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def device_kind(device: torch.device) -> str:
    """ "cpu", "cuda" or "hip"; ROCm's torch calls its devices cuda too."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type


class Dispatcher:
    """The choices of a process, and what its self-tests said."""

    def __init__(self, table: Mapping[str, Operator] = TABLE) -> None:
        self._table = table
        self._chosen: dict[tuple[str, str], Choice] = {}  # (kind of device, operator)
        self._faults: dict[tuple[str, Backend], str | None] = {}  # (kind of device, backend)
        self._first: dict[tuple[str, str], Any] = {}  # (type of device, operator) -> code, asked for with every call

    def backends(self, operator: str, device: torch.device) -> tuple[Backend, ...]:
        """All backends of an operator on `device`, fastest first; empty where there is no choice."""
        return self._table[operator].backends.get(device_kind(device), ())

    def names(self, operator: str, device: torch.device) -> tuple[str, ...]:
        """Their names; one name may stand for several."""
        return tuple(dict.fromkeys(backend.name for backend in self.backends(operator, device)))

    def choose(self, device: torch.device, choices: Mapping[str, Choice]) -> None:
        """Let operators run by these backends on `device` from now on."""
        for operator, choice in choices.items():
            self._chosen[device_kind(device), operator] = choice
        self._first.clear()

    def forget_choices(self) -> None:
        """Forget the choices from outside; what the self-tests said stays."""
        if self._chosen:
            self._chosen.clear()
            self._first.clear()

    def forget_faults(self) -> None:
        """Forget what the self-tests said."""
        self._faults.clear()
        self._first.clear()

    def chosen(self, operator: str, device: torch.device) -> Choice | None:
        """The choice from outside, if one was made."""
        return self._chosen.get((device_kind(device), operator))

    def fault(self, backend: Backend, device: torch.device) -> str | None:
        """Why a backend cannot be taken on `device`, in words; it is tried once for each kind of device."""
        if backend.name == REFERENCE:
            return None
        key = (device_kind(device), backend)
        if key not in self._faults:
            self._faults[key] = backend.unavailable() or _tested(backend, device)
        return self._faults[key]

    def allows(self, operator: str, backend: Backend, device: torch.device) -> bool:
        """Whether `backend` may run `operator`: not above a choice from outside, and chosen or without fault."""
        chosen = self.chosen(operator, device)
        if chosen is not None:
            names = self.names(operator, device)
            if names.index(backend.name) < names.index(chosen.backend):
                return False
            if backend.name == chosen.backend:
                return True
        return self.fault(backend, device) is None

    def code(self, operator: str, device: torch.device) -> Any:
        """The code that runs an operator on `device`, attention and the switches of torch apart."""
        key = (device.type, operator)
        code = self._first.get(key)
        if code is None:
            backends = self.backends(operator, device) or self._table[operator].backends["cpu"][-1:]
            code = next(b for b in backends if self.allows(operator, b, device)).load()
            self._first[key] = code
        return code

    def attention(self, device: torch.device, takes: Callable[[AttentionBackend], bool]) -> AttentionBackend | None:
        """The fastest backend of attention on `device` that `takes` what is asked and may run."""
        for backend in self.backends("attend", device):
            code: AttentionBackend = backend.load()
            if takes(code) and self.allows("attend", backend, device):
                return code
        return None

    def named(self, operator: str, name: str, device: torch.device) -> tuple[Backend, ...]:
        """What goes by `name` among the backends of an operator on `device`."""
        return tuple(backend for backend in self.backends(operator, device) if backend.name == name)

    def choice(self, operator: str, device: torch.device) -> Choice:
        """The backend that `operator` takes on `device`, and why no faster one."""
        chosen = self.chosen(operator, device)
        if chosen is not None:
            return chosen
        reasons: list[str] = []
        for name in self.names(operator, device):
            faults = [self.fault(backend, device) for backend in self.named(operator, name, device)]
            reasons += [fault for fault in faults if fault and fault not in reasons]
            if faults[0] is None:
                return Choice(name, "; ".join(reasons) or None)
        return Choice(REFERENCE, f"there is no fast backend for {device.type}")

    def choices(self, device: torch.device) -> dict[str, Choice]:
        """Operator -> its choice, for the operators that have one on `device`."""
        return {name: self.choice(name, device) for name in self._table if self.backends(name, device)}

    @contextmanager
    def torch_settings(self, device: torch.device) -> Iterator[None]:
        """Within this context torch itself uses the kernels and libraries that were chosen for `device`.

        Of the kernels of attention those above the chosen one are off; those below it take inputs that do not suit it.
        """
        kernels = self.chosen("sdpa", device)
        products = self.chosen("gemm", device)
        with ExitStack() as stack:
            if kernels is not None:
                names = self.names("sdpa", device)
                allowed = [_SDPA_KERNELS[name] for name in names[names.index(kernels.backend) :]]
                if "efficient" not in names:
                    allowed.append(SDPBackend.EFFICIENT_ATTENTION)
                if torch.backends.cuda.cudnn_sdp_enabled():
                    allowed.append(SDPBackend.CUDNN_ATTENTION)
                stack.enter_context(sdpa_kernel([*allowed, SDPBackend.MATH]))
            if products is not None:
                before = torch.backends.cuda.preferred_blas_library()
                wanted = "cublaslt" if products.backend == "hipblaslt" else "cublas"
                torch.backends.cuda.preferred_blas_library(wanted)
                stack.callback(torch.backends.cuda.preferred_blas_library, before)
            yield


def _tested(backend: Backend, device: torch.device) -> str | None:
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    # In a thread of its own: autocast, modes and hooks of the caller, such as a training step, do not reach there.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_test, backend, device).result()


def _test(backend: Backend, device: torch.device) -> str | None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own, at first that of number 0
        wrong = backend.test(backend.load(), device)
    except Exception as error:  # noqa: BLE001 - a compiler or driver may fail in any way; the next backend then runs
        wrong = f"{type(error).__name__}: {str(error)[:200]}"
    return f"self-test of the {backend.name} backend failed: {wrong}" if wrong else None


dispatcher = Dispatcher()
