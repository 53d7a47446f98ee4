"""Device profiles: how fast a device is, and what it takes before the first tensor.

A step's time is predicted from the operations of its products and the rate of products, the traffic of everything else
and the bandwidth, and the host's time for each operator, which on a CPU is added and on a GPU runs beside the rest. The
rates of this machine are measured in about two seconds and cached. For a named device they are the makers' peak
figures, of which a training is assumed to reach a share; so what follows from them is an estimate and says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch

from nybble.errors import InputError
from nybble.hardware import Device, free_bytes, used_bytes
from nybble.models import materialize, meta_model
from nybble.planning.extrapolate import TracedModel
from nybble.planning.traced_step import BatchShape, StepCost, batch_of, stepper
from nybble.recipe import load_recipe
from nybble.storage.atomic import write_text
from nybble.storage.cache import default_folder

_SUSTAINED_PRODUCTS, _SUSTAINED_TRAFFIC = 0.5, 0.7  # assumed shares of the published peaks
# Of the rate of one product again and again, what those of a step reach, whose operands are not in the cache and of
# which some are narrow; measured on a CPU (bench/speed/plan_seconds.py).
_STEP_SHARE = 0.8
_CONTEXT = {"cuda": 500_000_000, "hip": 600_000_000}  # driver context, kernels, library workspaces; estimates
# On a CPU the context is this process as it is, and what its libraries add before the first tensor of a phase: measured
# on the bundled model (torch 2.13, transformers 5.23): 36 MB by loading, 340 MB by generation, the trainer, oneDNN.
_LIBRARIES_LOADING, _LIBRARIES = 36_000_000, 340_000_000
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
_FEW = BatchShape((16,))
_ALLOCATOR_SHARE = 0.03  # of the live tensors, lost between the pieces of a GPU's caching allocator; estimate


@dataclass(frozen=True)
class Links:
    """The links of a device to the other devices of its machine."""

    bytes_per_second: float  # that one sends while it receives as much
    at_once: int = 1  # in a mesh there is a link to each of the others

    def rate(self, n: int) -> float:
        """Bytes a second that each of `n` devices sends to the others together."""
        return self.bytes_per_second * max(min(self.at_once, n - 1), 1)


@dataclass(frozen=True)
class Profile:
    """The facts about a device that a plan is made from."""

    name: str
    backend: str  # cpu, cuda or hip
    flops_per_second: float  # of bfloat16 products
    bytes_per_second: float
    memory_bytes: int  # that a run may take, what it takes already included
    context_bytes: int  # taken before the first tensor
    is_estimate: bool  # the rates are published figures, not measured
    shares_memory: bool = False  # with the host
    operator_seconds: float = 2e-5  # of the host for each operator; measured on this machine, else an estimate
    has_bfloat16: bool = True  # worth using
    links: Links = Links(25e9)  # PCIe 4.0 x16, less what its protocol takes

    def context_in(self, phase: str) -> int:
        """Bytes that `phase` takes besides tensors and their allocator."""
        later = _LIBRARIES_LOADING if phase == "load" else _LIBRARIES
        return self.context_bytes + (later if self.backend == "cpu" else 0)

    @property
    def rounding(self) -> int:
        """Each tensor takes a multiple of this many bytes."""
        return 1 if self.backend == "cpu" else 512

    def allocator_bytes(self, live_bytes: int) -> int:
        """Bytes that the allocator holds beyond the live tensors."""
        return 0 if self.backend == "cpu" else int(_ALLOCATOR_SHARE * live_bytes)

    def seconds(self, work: StepCost) -> float:
        """The predicted time of a step."""
        computing = work.flops / self.flops_per_second + work.moved_bytes / self.bytes_per_second
        calling = work.operators * self.operator_seconds
        return computing + calling if self.backend == "cpu" else max(computing, calling)


def _published(
    name: str, backend: str, tflops: float, gigabytes_per_second: float, gigabytes: float, links: Links
) -> Profile:
    rates = (1e12 * tflops * _SUSTAINED_PRODUCTS, 1e9 * gigabytes_per_second * _SUSTAINED_TRAFFIC)
    return Profile(name, backend, *rates, int(1e9 * gigabytes), _CONTEXT[backend], True, links=links)


# What others measured of links: MI300X 48 of 64 GB/s on each of 7 (AMD's ROCm blog of 2025-03-02, "Understanding RCCL
# Bandwidth and xGMI Performance"), and that share of the MI250's 50; H100 and so H200 380 of 450 (NVIDIA/nccl #1264);
# RTX 4090 12 of 31.5, for its driver lets cards talk through the host alone (p2pBandwidthLatencyTest).
_NVLINK, _LOOPBACK = Links(380e9), Links(0.3e9)  # gloo within a machine: two cores of an Intel Xeon, 2026-11-26
# NVLink of the A100 (300 each way) and the links between MI300A (two of 64 to each of 3) by the same shares.
# Dense bfloat16 (or float16) products, with sums in float32, and bandwidth as the makers give them. NVIDIA: data sheets
# of A100 80GB SXM, H100 SXM, H200, L40S and T4, whitepapers of GA102 (RTX 3090) and AD102 (RTX 4090). AMD: data sheets
# of the Instincts, product pages of the Radeons; RDNA 3 computes float16 products at the rate of its vectors.
PROFILES = {
    "mi250-gcd": _published("MI250, one GCD", "hip", 181.0, 1638, 64, Links(37e9)),
    "mi300x": _published("MI300X", "hip", 1307.4, 5300, 192, Links(48e9, 7)),
    "mi300a": replace(_published("MI300A", "hip", 980.6, 5300, 128, Links(96e9, 3)), shares_memory=True),
    "rx7900xtx": _published("RX 7900 XTX", "hip", 122.8, 960, 24, Links(25e9)),
    "w7900": _published("Radeon PRO W7900", "hip", 122.6, 864, 48, Links(25e9)),
    "r9700": _published("Radeon AI PRO R9700", "hip", 191.0, 640, 32, Links(50e9)),  # PCIe 5.0
    # One to a machine, and between machines 10 gigabits.
    "strix-halo": replace(_published("Strix Halo", "hip", 59.4, 256, 96, Links(1.1e9)), shares_memory=True),
    "rtx3090": _published("RTX 3090", "cuda", 71.0, 936, 24, Links(12e9)),
    "rtx4090": _published("RTX 4090", "cuda", 165.2, 1008, 24, Links(12e9)),
    "t4": replace(_published("T4", "cuda", 65.0, 300, 16, Links(12e9)), has_bfloat16=False),  # PCIe 3.0
    "l40s": _published("L40S", "cuda", 362.1, 864, 48, Links(25e9)),
    "a100": _published("A100 80GB", "cuda", 312.0, 2039, 80, Links(253e9)),
    "h100": _published("H100", "cuda", 989.0, 3350, 80, _NVLINK),
    "h200": _published("H200", "cuda", 989.0, 4800, 141, _NVLINK),
}
# By the name that torch gives a device; other devices are assumed to have PCIe.
_LINKS = {
    "MI300X": PROFILES["mi300x"].links,
    "MI300A": PROFILES["mi300a"].links,
    "A100-SXM4": PROFILES["a100"].links,
    "MI250": PROFILES["mi250-gcd"].links,
    "RTX 4090": PROFILES["rtx4090"].links,
    "H100 80GB HBM3": _NVLINK,
    "H200": _NVLINK,
}


def named_profile(name: str) -> Profile:
    """The profile of a device that this machine need not have, by its key or as its maker writes it.

    Raises:
        InputError: the name is not in the list.
    """
    by_name = {_letters(spelling): profile for key, profile in PROFILES.items() for spelling in (key, profile.name)}
    found = by_name.get(_letters(name))
    if found is None:
        near = get_close_matches(_letters(name), by_name, n=1)
        known = ", ".join(PROFILES)
        hint = f"did you mean {by_name[near[0]].name!r}?" if near else f"known: {known}"
        raise InputError(f"--device-profile {name!r} is not known; {hint}")
    return found


def _letters(name: str) -> str:
    """What two spellings of a name have in common: "MI250, one GCD" and "mi250-gcd" name one device."""
    return "".join(c for c in name.lower().replace("one gcd", "gcd") if c.isalnum())


def profile_of(device: Device, n_beside: int = 1) -> Profile:
    """The profile of a device of this machine, for one of `n_beside` processes that share its memory.

    Its rates are measured once and cached.
    """
    return _profile(device, _kept_rates(device), n_beside)


def measured_profile(device: Device, clock: Callable[[], float] = time.perf_counter) -> Profile:
    """The profile of a device of this machine, its rates measured now."""
    return _profile(device, _measured_rates(device, clock))


Rates = tuple[float, float, float]  # products, traffic, seconds for an operator


def _profile(device: Device, rates: Rates, n_beside: int = 1) -> Profile:
    where = device.torch_device
    used = used_bytes(where)
    context = used if device.type == "cpu" else _CONTEXT[device.backend]
    free = free_bytes(where) // n_beside
    # A machine whose GPU shares its memory freezes where another raises an error: a plan may not count on all of it.
    memory = (int(device.usable_share * free) if device.type == "cuda" and device.shares_memory else free) + used
    products, traffic, operator = rates
    known = (links for word, links in _LINKS.items() if word in device.name)
    links = _LOOPBACK if device.type == "cpu" else next(known, Profile.links)
    return Profile(
        device.name,
        device.backend,
        products,
        traffic,
        memory,
        context,
        is_estimate=False,
        shares_memory=device.shares_memory,
        operator_seconds=operator,
        has_bfloat16=device.has_bfloat16,
        links=links,
    )


def _kept_rates(device: Device) -> Rates:
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = f"{device.name}|{torch.__version__}|{threads}"
    file = default_folder() / "devices.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        products, traffic, operator = (float(rate) for rate in known[key])
        return products, traffic, operator
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    rates = _measured_rates(device, time.perf_counter)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**(known if isinstance(known, dict) else {}), key: rates}))
    except OSError:
        return rates  # a cache that cannot be written costs the next plan three seconds
    return rates


def _measured_rates(device: Device, clock: Callable[[], float]) -> Rates:
    stopwatch = _Stopwatch(device, clock)
    rates = (_product_rate(device, stopwatch), _traffic_rate(device, stopwatch), _operator_seconds(stopwatch))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


@dataclass(frozen=True)
class _Stopwatch:
    device: Device
    clock: Callable[[], float]

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes: the median of the runs in half a second, of five at least."""
        taken: list[float] = []
        work()
        started = time.perf_counter()
        while len(taken) < 5 or time.perf_counter() - started < 0.5:
            before = self.clock()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(self.clock() - before)
        return sorted(taken)[len(taken) // 2]


def _product_rate(device: Device, stopwatch: _Stopwatch) -> float:
    n = 1024 if device.type == "cpu" else 8192
    # Random, since GPUs multiply ones faster than weights: fewer bits change, which takes less power.
    random = torch.Generator(device.torch_device).manual_seed(0)
    a, b = (torch.empty(n, n, dtype=torch.bfloat16, device=random.device).normal_(generator=random) for _ in range(2))
    return _STEP_SHARE * 2 * n**3 / stopwatch(lambda: torch.mm(a, b))


def _traffic_rate(device: Device, stopwatch: _Stopwatch) -> float:
    """Bytes a second of an addition in place, which reads two numbers and writes one."""
    n = 1 << (23 if device.type == "cpu" else 26)
    a, b = (torch.ones(n, dtype=torch.bfloat16, device=device.torch_device) for _ in range(2))
    return 3 * 2 * n / stopwatch(lambda: a.add_(b))


def _operator_seconds(stopwatch: _Stopwatch) -> float:
    """Seconds for each operator of a step that is so small that nothing else counts."""
    from transformers import AutoConfig

    recipe = load_recipe(None, {"r": 4})
    setting = TracedModel(AutoConfig.for_model("llama", **_TINY), recipe, torch.bfloat16)
    work, _ = setting.trace(_FEW, range(setting.n_layers), 0)
    model = meta_model(setting.config, recipe, setting.dtype)
    batch = batch_of(model, _FEW)
    materialize(model)
    return stopwatch(stepper(model, batch, setting.dtype)) / work.operators
