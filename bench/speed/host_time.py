"""What the host takes to issue a step on a GPU, without one: ours beside transformers + PEFT + bitsandbytes.

Both sides train the same tiny Llama on the CPU, where products take next to no time, so that what is left is Python,
torch's dispatch and the launches. Ours runs the code of GPUs: Triton's kernels are compiled for a target, and the
driver that would launch them does nothing; torch's attention for rows of different lengths is an operator that returns
empty results. So the figure, processor time of the one thread that there is, is the time in which a GPU gets its work,
and a step is never faster than that.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness import Option, print_table, run

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
CASES = {
    "all linears, r 16, dropout 0.1": ("all-linear", 16, 0.1),
    "q and v, r 8, dropout 0.1": ("q_proj,v_proj", 8, 0.1),
}
Step = Callable[[], tuple[float, float]]


class Driver:
    """Stands where Triton asks for the device at hand; a launch is counted and does nothing."""

    launches = 0

    class utils:  # noqa: N801 - Triton's name
        """What Triton asks of a driver's helper: to load a kernel, and what the device has."""

        @staticmethod
        def load_binary(*_: Any) -> tuple[Any, ...]:
            return object(), 1, 0, 0, 1024

        @staticmethod
        def unload_module(_module: Any) -> None:
            return None

        @staticmethod
        def get_device_properties(_device: int) -> dict[str, int]:
            return {"max_shared_mem": 65536, "multiprocessor_count": 100}

    class launcher_cls:  # noqa: N801 - Triton's name
        """A launcher of one kernel."""

        def __init__(self, _source: Any, _metadata: Any) -> None:
            self.calls = 0

        def __call__(self, *_: Any) -> None:
            Driver.launches += 1

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 4096  # where Triton keeps the kernels of this target

    def get_current_stream(self, _device: int) -> int:
        return 0


def use_code_of_gpus(target: str) -> None:
    """Let operators on CPU tensors run as on a GPU of `target`, up to the launch."""
    from triton.runtime import driver

    from nybble.kernels.attention.backend import AttentionBackend
    from nybble.kernels.dispatch import Backend, dispatcher
    from nybble.kernels.ops4bit import triton as ops4bit
    from nybble.kernels.pointwise import triton as pointwise
    from tools.kernel_code.listing import gpu_target, wave

    driver._active = Driver(gpu_target(target))
    for module in (ops4bit, pointwise):
        module.wave_of = lambda _device: wave(target)  # type: ignore[attr-defined]
    for operator, code in (("dequantize_4bit", ops4bit), ("gemv_4bit", ops4bit), ("rows", pointwise)):
        dispatcher._first["cpu", operator] = code
    varlen = AttentionBackend("varlen", lambda: None, lambda _q, _settings: True, _attend, lambda *_: ())
    table: Any = dispatcher._table
    table["attend"].backends["cpu"] = (Backend("torch", lambda: varlen, lambda: None, lambda *_: None),)


@torch.library.custom_op("bench::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Empty results of the shapes of torch's kernel."""
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("bench::varlen_backward", mutates_args=())
def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _back(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*torch.ops.bench.varlen_backward(grad, *ctx.saved_tensors), None, None, None)


varlen.register_autograd(_back, setup_context=_save)


def _attend(q: Tensor, k: Tensor, v: Tensor, settings: Any) -> Tensor:
    from nybble.kernels.attention.varlen import _ends

    out: Tensor = torch.ops.bench.varlen(
        q, k, v, _ends(tuple(settings.lengths), q.device), max(settings.lengths), settings.scale
    )[0]
    return out.contiguous()


def ours(layers: int, targets: str, r: int, dropout: float) -> Step:
    """A step of Nybble's, as its loop runs it: forward and backward."""
    from transformers import AutoConfig

    from nybble.models import materialize, meta_model, recomputable_layers, recompute_by, set_recomputed
    from nybble.models.lora_linear import share_seeds
    from nybble.nn.dropout_seed import DropoutSeeds
    from nybble.nn.recompute import recomputed
    from nybble.planning.traced_step import BatchShape, batch_of
    from nybble.recipe import load_recipe

    names = targets if targets == "all-linear" else targets.split(",")
    recipe = load_recipe(None, {"r": r, "lora_dropout": dropout, "target_modules": names})
    model = meta_model(AutoConfig.for_model("llama", num_hidden_layers=layers, **SIZES), recipe, torch.bfloat16)
    batch = batch_of(model, BatchShape((16, 16, 16, 16)))
    materialize(model)
    share_seeds(model, DropoutSeeds(0, 0))
    recompute_by(recomputable_layers(model), recomputed)
    set_recomputed(recomputable_layers(model), 0)
    return _step(model.train(), {**batch, "num_items_in_batch": 1})


def theirs(layers: int, targets: str, r: int, dropout: float) -> Step:
    """The same of PEFT on a base that bitsandbytes has packed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(num_hidden_layers=layers, **SIZES)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
    names: Any = targets if targets == "all-linear" else targets.split(",")
    lora = LoraConfig(r=r, lora_alpha=16, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
    ids = torch.randint(0, 128, (4, 16))
    return _step(get_peft_model(base, lora).train(), {"input_ids": ids, "labels": ids})


def _step(model: Any, batch: dict[str, Any]) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[float, float]:
        started = time.thread_time()
        with torch.autograd.set_multithreading_enabled(False):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            middle = time.thread_time()
            loss.backward()
        ended = time.thread_time()
        for parameter in trained:
            parameter.grad = None
        return middle - started, ended - middle

    return step


@dataclass(frozen=True)
class Side:
    """One side of a case: a step of a shallow model and one of a deeper, whose difference is that of some layers."""

    few: Step
    many: Step
    layers: int

    def microseconds(self) -> dict[str, float]:
        """Of a layer, forward and backward."""
        low, high = ([min(part) for part in zip(*(s() for _ in range(5)), strict=True)] for s in (self.few, self.many))
        forward, backward = (1e6 * (b - a) / self.layers for a, b in zip(low, high, strict=True))
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def launches(self) -> float:
        """Launches of our kernels in a layer."""
        return (_launches(self.many) - _launches(self.few)) / self.layers

    def calls(self) -> float:
        """Calls of functions, in Python and from it into C, that a layer takes: the same on every machine."""
        return (_calls(self.many) - _calls(self.few)) / self.layers


def _launches(step: Step) -> int:
    before = Driver.launches
    step()
    return Driver.launches - before


def _calls(step: Step) -> int:
    n = 0

    def see(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(see)
    step()
    sys.setprofile(None)
    gc.enable()
    return n


def sides_of(layers: int, target: str) -> dict[str, dict[str, Side]]:
    """Case -> side -> its steps."""
    # First all models: which of our blocks are taken is decided by their numbers, while there are any.
    made = {
        name: {side.__name__: Side(side(2, *case), side(2 + layers, *case), layers) for side in (ours, theirs)}
        for name, case in CASES.items()
    }
    use_code_of_gpus(target)
    return made


def measure(asked: Namespace) -> dict[str, Any]:
    """Every case, both sides in turns."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name, sides in sides_of(asked.layers, asked.target).items():
        turns = [{name: side.microseconds() for name, side in sides.items()} for _ in range(1 + asked.rounds)][1:]
        middle = {
            side: {part: round(statistics.median(turn[side][part] for turn in turns)) for part in turns[0][side]}
            for side in sides
        }
        found[name] = {
            "microseconds_a_layer": middle,
            "ratio": round(statistics.median(turn["ours"]["both"] / turn["theirs"]["both"] for turn in turns), 2),
            "launches_a_layer": sides["ours"].launches(),
            "calls_a_layer": {side: of.calls() for side, of in sides.items()},
        }
        print(json.dumps({name: found[name]}), file=sys.stderr)
    rows = (
        (name, f["microseconds_a_layer"]["ours"]["both"], f["microseconds_a_layer"]["theirs"]["both"], f["ratio"])
        for name, f in found.items()
    )
    print_table("adapters | Nybble, us a layer | PEFT + bitsandbytes | ratio", rows)
    return found


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("target", "gfx942", help="the GPU that the kernels are compiled for"),
        Option("layers", 8, tiny=1),
        Option("rounds", 20, tiny=1),
    )
