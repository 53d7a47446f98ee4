"""GPUs that are not here: several of them, an APU, a card in use by another process, one of 16 GiB.

torch is made to say what it would say there. What is asked is what a first run would meet before any kernel.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nybble
from nybble.errors import CannotRunError, RecipeError
from nybble.hardware import PeakMemory, detect_device, is_out_of_memory, reserved_bytes
from nybble.kernels import send
from nybble.kernels.dispatch import Backend, Choice, Dispatcher, Operator
from nybble.planning.devices import measured_profile
from nybble.preparation import fit_to_processes
from nybble.recipe import load_recipe
from nybble.run.processes import Processes
from nybble.training.activation_checkpointing import Room

GIB = 1 << 30
SOURCE = Path(nybble.__file__).parent


@dataclass
class Simulated:
    """A machine with GPUs, as torch describes it."""

    n_gpus: int = 1
    total_bytes: int = 64 * GIB
    in_use_bytes: int = 0  # by other processes
    is_integrated: bool = False
    backend: str = "hip"
    current: dict[str, int] = field(default_factory=dict)  # thread -> its current device, at first 0
    asked: list[Any] = field(default_factory=list)  # devices that were asked for figures

    def set_device(self, device: Any) -> None:
        self.current[current_thread().name] = getattr(device, "index", device)

    def current_device(self) -> int:
        return self.current.get(current_thread().name, 0)

    def properties(self, device: Any) -> Any:
        index = getattr(device, "index", device)
        assert index < self.n_gpus
        return SimpleNamespace(
            name=f"card {index}", total_memory=self.total_bytes, multi_processor_count=104, gcnArchName="gfx90a",
            is_integrated=self.is_integrated, warp_size=64,
        )  # fmt: skip

    def figure(self, device: Any = None) -> int:
        self.asked.append(device)
        return 0


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulated]:
    """Make torch see a simulated machine."""

    def make(**facts: Any) -> Simulated:
        made = Simulated(**facts)
        cuda, hip = torch.cuda, "7.2.0" if made.backend == "hip" else None
        monkeypatch.setattr(torch.version, "hip", hip)
        seen: dict[str, Any] = {
            "is_available": lambda: made.n_gpus > 0,
            "device_count": lambda: made.n_gpus,
            "set_device": made.set_device,
            "current_device": made.current_device,
            "get_device_properties": made.properties,
            "is_bf16_supported": lambda **_: True,
            "mem_get_info": lambda _device: (made.total_bytes - made.in_use_bytes, made.total_bytes),
            "memory_allocated": made.figure,
            "memory_reserved": made.figure,
            "max_memory_allocated": made.figure,
            "max_memory_reserved": made.figure,
            "reset_peak_memory_stats": made.figure,
        }
        for name, function in seen.items():
            monkeypatch.setattr(cuda, name, function)
        return made

    return make


@pytest.mark.parametrize("n", [1, 2, 8])
def test_one_process_has_one_device_and_says_which(simulate: Callable[..., Simulated], n: int) -> None:
    simulate(n_gpus=n)
    device = detect_device()
    assert device.torch_device == torch.device("cuda", 0)
    said = device.among_others
    assert (said is None) == (n == 1)
    if said:
        assert said.startswith(
            f"{n} GPUs are visible and one process uses one: cuda:0, card 0; choose by --device cuda:N"
        )
        assert "HIP_VISIBLE_DEVICES" in said


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_a_gpu_is_taken_by_its_number(simulate: Callable[..., Simulated], backend: str) -> None:
    made = simulate(n_gpus=2, backend=backend)
    device = detect_device(f"{backend}:1")
    assert (device.name, device.index, device.backend) == ("card 1", 1, backend)
    assert device.torch_device == torch.device("cuda", 1)
    assert made.current_device() == 1  # libraries follow it
    assert detect_device("cuda").index == 1  # torch's own choice is kept
    PeakMemory(device).peak_bytes()
    reserved_bytes(device)
    assert set(made.asked) == {torch.device("cuda", 1)}


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (1, r"'cuda:3' is not there: torch sees 1 GPU, cuda:0 \(HIP_VISIBLE_DEVICES=5\)"),
        (2, r"torch sees 2 GPUs, cuda:0 to cuda:1"),
        (0, r"sees no GPU \(HIP_VISIBLE_DEVICES=5\); use --device cpu"),
    ],
)
def test_a_number_that_is_not_there_is_refused(
    simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch, n: int, words: str
) -> None:
    simulate(n_gpus=n)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "5")
    with pytest.raises(CannotRunError, match=words):
        detect_device("cuda:3")


def test_a_number_is_for_one_process() -> None:
    recipe = load_recipe(None, {"device": "hip:1"})
    assert fit_to_processes(recipe, Processes()) is recipe
    with pytest.raises(RecipeError, match=r"device hip:1 is for one process, and 2 were started.*use --device cuda"):
        fit_to_processes(recipe, Processes(count=2))


@pytest.mark.parametrize("wanted", ["cuda:", "cpu:0", "cuda:-1", "hip:x", "cuda:1000"])
def test_other_words_for_devices_are_refused(wanted: str) -> None:
    with pytest.raises(RecipeError, match=r"model.device"):
        load_recipe(None, {"device": wanted})


@pytest.mark.parametrize(("device", "tested"), [("cuda:1", 1), ("cuda", 2)])
def test_a_backend_is_tested_on_the_device_that_asks(
    simulate: Callable[..., Simulated], device: str, tested: int
) -> None:
    made = simulate(n_gpus=4)
    made.set_device(2)
    on: list[tuple[int, torch.device]] = []
    backend = Backend("one", lambda: None, lambda: None, lambda _, device: on.append((made.current_device(), device)))
    dispatcher = Dispatcher({"rows": Operator({"hip": (backend,)})})
    dispatcher.code("rows", torch.device(device))
    assert on == [(tested, torch.device("cuda", tested))]
    assert made.current_device() == 2


def test_what_comes_behind_the_chosen_backend_is_not_tested(simulate: Callable[..., Simulated]) -> None:
    simulate()
    tested: list[str] = []

    def backend(name: str) -> Backend:
        return Backend(name, lambda: name, lambda: None, lambda code, _: tested.append(code))  # type: ignore[func-returns-value]

    ladder = Operator({"hip": (backend("first"), backend("second"), backend("torch"))})
    dispatcher, here = Dispatcher({"rows": ladder, "attend": ladder}), torch.device("cuda", 0)
    dispatcher.choose(here, {"rows": Choice("first"), "attend": Choice("first")})
    assert dispatcher.code("rows", here) == "first"
    assert dispatcher.attention(here, lambda code: True) == "first"  # type: ignore[comparison-overlap]
    assert tested == []
    assert dispatcher.attention(here, lambda code: code == "second") == "second"  # type: ignore[comparison-overlap]
    assert tested == ["second"]


@pytest.mark.parametrize(("is_integrated", "share"), [(False, 0.95), (True, 0.80)])
def test_a_gpu_that_shares_the_host_s_memory_leaves_more_of_it(
    simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch, is_integrated: bool, share: float
) -> None:
    simulate(is_integrated=is_integrated)
    device = detect_device()
    assert Room(device, None).bytes_now() == pytest.approx(share * 64 * GIB)
    assert Room(device, 8 * GIB).bytes_now() == pytest.approx(0.95 * 8 * GIB)  # what is asked for is given
    monkeypatch.setattr("nybble.planning.devices._measured_rates", lambda *_: (1.0, 1.0, 1.0))
    wanted = 0.80 * 64 * GIB if is_integrated else 64 * GIB
    assert measured_profile(device).memory_bytes == pytest.approx(wanted)


def test_what_another_process_holds_is_not_planned_with(
    simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(total_bytes=24 * GIB, in_use_bytes=20 * GIB)
    monkeypatch.setattr("nybble.planning.devices._measured_rates", lambda *_: (1.0, 1.0, 1.0))
    device = detect_device()
    assert measured_profile(device).memory_bytes == 4 * GIB
    assert Room(device, None).bytes_now() == pytest.approx(0.95 * 4 * GIB)


@pytest.mark.parametrize(
    "words",
    [
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "HIP error: HIPBLAS_STATUS_ALLOC_FAILED",
        "rocblas_status_memory_error",
        "HIP error: hipErrorOutOfMemory",
        "miopenStatusMemoryError",
    ],
)
def test_what_libraries_of_gpus_say_is_out_of_memory(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "Memory access fault"])
def test_a_fault_of_memory_is_not_a_lack_of_it(words: str) -> None:
    assert not is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_model_asks_a_card_for_its_packed_bytes(double_quant: bool) -> None:
    """transformers allocates what it expects to load in one piece; 8B in 16 bits is more than a 16 GiB card has."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import get_total_byte_count

    from nybble.models.quantizer import NybbleConfig, NybbleQuantizer

    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantizer = NybbleQuantizer(NybbleConfig(bnb_4bit_use_double_quant=double_quant))
    quantizer._process_model_before_weight_loading(model)
    places = {name: torch.device("cuda", 0) for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    (asked,) = get_total_byte_count(model, places, quantizer).values()
    in_16_bits = 2 * 2 * 128256 * 4096 + 2 * 65 * 4096
    n_packed = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    bits = 4 + 8 / 64 + 32 / (64 * 256) if double_quant else 4 + 32 / 64
    assert asked == pytest.approx(in_16_bits + n_packed * bits / 8, rel=1e-5)
    assert asked < 6.5e9


def test_tensors_are_sent_while_the_host_goes_on() -> None:
    calls: list[Any] = []

    class Host:
        def pin_memory(self) -> Host:
            calls.append("pinned")
            return self

        def to(self, *where: Any, **how: Any) -> Host:
            calls.append((where, how))
            return self

    send(Host(), torch.device("cuda", 1))  # type: ignore[arg-type]
    assert calls == ["pinned", ((torch.device("cuda", 1),), {"non_blocking": True})]
    here = torch.ones(3)
    assert send(here, torch.device("cpu")) is here


STEP = ("kernels", "nn", "models/blocks", "training/loop.py", "training/state.py", "training/guards.py")
NOT_A_STEP = ("self_test.py",)


def test_no_step_makes_tensors_of_numbers_on_a_gpu() -> None:
    """`torch.tensor(numbers, device=gpu)` copies from memory that is not pinned: the host waits for all before it."""
    found = []
    files = [
        file for part in STEP for file in ([SOURCE / part] if part.endswith(".py") else (SOURCE / part).rglob("*.py"))
    ]
    assert len(files) > 40
    for file in files:
        if file.name in NOT_A_STEP:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.from_numpy"):
                device = next((ast.unparse(k.value) for k in node.keywords if k.arg == "device"), "'cpu'")
                found += [f"{file.name}:{node.lineno}"] if device != "'cpu'" else []
    assert found == []


def test_deterministic_training_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.training.build import _deterministic

    deterministic: Any = torch.utils.deterministic
    assert deterministic.fill_uninitialized_memory
    with _deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not deterministic.fill_uninitialized_memory
    assert deterministic.fill_uninitialized_memory
