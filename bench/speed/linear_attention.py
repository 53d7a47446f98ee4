"""Parts of recurrent layers on a CPU, forward and backward: transformers' own torch code, ours in torch, and ours in C.

One row, so that transformers' code, which knows no rows, computes the same. Memory is the highest resident memory of a
fresh process above what it held before; a side runs in a process of its own.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.harness import Option, ResidentPeak, fresh, medians, print_table, run
from nybble.kernels import dispatcher
from nybble.kernels.dispatch import Choice
from nybble.nn.linear_attention import convolve_rows, delta_rule_rows, mamba2_rows
from nybble.nn.rows import Rows

# What is computed: key heads, heads, width of keys and of values, and channels and taps of the convolution.
SHAPES = {
    "gated delta rule": (4, 8, 128, 128),  # a quarter of the heads of Qwen3-Next
    "Mamba-2": (1, 16, 128, 64),  # an eighth of the heads of Bamba-9B, one group
    "short convolution": (1, 1, 2048, 4),
}
SIDES = ("transformers", "native")  # and torch


def _delta_rule(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    theirs = import_module("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule
    key_heads, heads, width, value_width = SHAPES["gated delta rule"]
    q, k = (torch.randn(1, tokens, key_heads, width).bfloat16() for _ in range(2))
    v = torch.randn(1, tokens, heads, value_width).bfloat16()
    inputs = [q, k, v, -torch.rand(1, tokens, heads), torch.rand(1, tokens, heads)]
    rows, settings = Rows((tokens,)), {"use_qk_l2norm_in_kernel": True}
    return (
        inputs,
        lambda q, k, v, g, beta: theirs(q, k, v, g=g, beta=beta, **settings)[0],
        lambda q, k, v, g, beta: delta_rule_rows(rows, q, k, v, g, beta, **settings)[0],
    )


def _mamba2(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    theirs = import_module("transformers.models.bamba.modeling_bamba").mamba2_chunk_scan
    groups, heads, states, width = SHAPES["Mamba-2"]
    x, dt = torch.randn(1, tokens, heads, width).bfloat16(), torch.randn(1, tokens, heads).bfloat16()
    b, c = (torch.randn(1, tokens, groups, states).bfloat16() for _ in range(2))
    a, rows = -torch.rand(heads), Rows((tokens,))
    return (
        [x, dt, b, c],
        lambda x, dt, b, c: theirs(x, dt, a, b, c, chunk_size=256, dt_softplus=True),
        lambda x, dt, b, c: mamba2_rows(rows, x, dt, a, b, c, dt_softplus=True),
    )


def _convolution(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    theirs = import_module("transformers.models.qwen3_next.modeling_qwen3_next").causal_conv1d_fn
    _, _, channels, taps = SHAPES["short convolution"]
    weight, rows = torch.randn(channels, taps), Rows((tokens,))
    return (
        [torch.randn(1, tokens, channels).bfloat16()],
        lambda x: theirs(x.transpose(1, 2), weight, activation="silu"),
        lambda x: convolve_rows(rows, x.transpose(1, 2), weight, activation="silu"),
    )


_PARTS = {"gated delta rule": _delta_rule, "Mamba-2": _mamba2, "short convolution": _convolution}


def step(part: str, side: str, tokens: int) -> Callable[[], dict[str, float]]:
    """A function that runs forward and backward once, and returns its seconds."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    inputs, theirs, ours = _PARTS[part](tokens)
    grads: list[Tensor] = []

    def once() -> dict[str, float]:
        if side != "transformers":
            dispatcher.choose(cpu, {"linear_attention": Choice(side)})
        leaves = [x.detach().requires_grad_() for x in inputs]
        began = time.perf_counter()
        out = (theirs if side == "transformers" else ours)(*leaves)
        grads[:] = grads or [torch.randn_like(out, dtype=torch.float32)]
        torch.autograd.grad(out, leaves, grads[0].to(out.dtype))
        return {"seconds": time.perf_counter() - began}

    return once


def memory(part: str, side: str, tokens: int) -> int:
    """Bytes that one step takes at its highest, in a process that has run a small one."""
    step(part, side, 64)()
    run_once = step(part, side, tokens)
    peak = ResidentPeak()
    run_once()
    return peak.read()


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Each part by each side."""
    found = []
    for part in SHAPES:
        seconds = medians({side: step(part, side, asked.tokens) for side in asked.sides}, asked.repeats, quiet=True)
        peaks = {
            side: fresh("bench.speed.linear_attention", "memory", part, side, asked.tokens) for side in asked.sides
        }
        speeds = {side: asked.tokens / seconds[side]["seconds"] for side in asked.sides}
        found.append({"part": part, "shape": SHAPES[part], "tokens_per_second": speeds, "peak_bytes": peaks})
    rows = [(f, side, speed) for f in found for side, speed in f["tokens_per_second"].items()]
    print_table(
        "part | by | tokens/s | times transformers | peak, MiB",
        (
            (
                f["part"],
                side,
                round(speed),
                f"{speed / f['tokens_per_second'][asked.sides[0]]:.1f}",
                f["peak_bytes"][side] >> 20,
            )
            for f, side, speed in rows
        ),
    )
    return found


if __name__ == "__main__":
    run(measure, __doc__, Option("tokens", 4096, tiny=128), Option("repeats", 3, tiny=1), Option("sides", SIDES))
