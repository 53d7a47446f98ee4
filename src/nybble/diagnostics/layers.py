"""Checks of layers, forward and backward, against float64 on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nybble.diagnostics.measure import CheckOutcome, UnavailableError, apart, dtypes_of, normal
from nybble.diagnostics.operators import decode_exactly
from nybble.diagnostics.rates import products_per_second
from nybble.nn import Linear4bit
from nybble.quant import PackedWeight, encode

HEAD_SIZES = (64, 80, 96, 128, 256)
RANKS = (8, 16, 64)
_KINDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def linear(device: torch.device, _path: str) -> CheckOutcome:
    """Check a packed linear layer: y and the gradient of x."""
    worst = 0.0
    for dtype in dtypes_of(device):
        layer, exact = packed_linear(160, 96, device, dtype, seed=1)
        x = normal(48, 96, seed=2, dtype=dtype)
        g = normal(48, 160, seed=3, dtype=dtype)
        results = with_gradients(layer, [x], g, device)
        worst = max(worst, apart_at_worst(results, [x.double() @ exact.t(), g.double() @ exact]))
    return CheckOutcome(worst)


def lora_by_peft(device: torch.device, _path: str) -> CheckOutcome:
    """Check PEFT's LoRA around a packed linear layer: y and the gradients of x, A and B."""
    from peft import LoraConfig, get_peft_model

    worst = 0.0
    for rank in RANKS:
        layer, w = packed_linear(160, 96, device, torch.bfloat16, seed=rank)
        block = nn.ModuleDict({"q_proj": layer})
        get_peft_model(block, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=["q_proj"]))
        adapted: Any = block["q_proj"]
        a = normal(rank, 96, seed=4)
        b = normal(160, rank, seed=5)
        factors = [adapted.lora_A["default"].weight, adapted.lora_B["default"].weight]
        for factor, value in zip(factors, (a, b), strict=True):
            factor.data.copy_(value)
        adapted.to(device)
        x = normal(48, 96, seed=6, dtype=torch.bfloat16)
        g = normal(48, 160, seed=7, dtype=torch.bfloat16)
        # The precision of training: 16-bit products, float32 master weights.
        with torch.autocast(device.type, torch.bfloat16):
            y, dx = with_gradients(adapted, [x], g, device)
        a64, b64, x64, g64 = (t.to(torch.bfloat16).double() for t in (a, b, x, g))
        inner = 2 * g64 @ b64
        expected = [x64 @ w.t() + 2 * x64 @ a64.t() @ b64.t(), g64 @ w + inner @ a64]
        grads = [factor.grad.to(torch.bfloat16) for factor in factors]
        worst = max(worst, apart_at_worst([y, dx, *grads], [*expected, inner.t() @ x64, 2 * g64.t() @ (x64 @ a64.t())]))
    return CheckOutcome(worst)


def attention(device: torch.device, path: str) -> CheckOutcome:
    """Check one of torch's attention backends: y and the gradients of q, k and v at common head sizes."""
    errors = []
    tokens = 130  # not a multiple of any tile size
    for size in HEAD_SIZES:
        q, k, v, g = (normal(2, 3, tokens, size, seed=s, dtype=torch.bfloat16) for s in range(4))
        try:
            with sdpa_kernel([_KINDS[path]]):
                results = with_gradients(_causal, [q, k, v], g, device)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
                raise
            continue  # torch falls back to another backend by itself
        wide = [t.double().requires_grad_() for t in (q, k, v)]
        scores = wide[0] @ wide[1].transpose(-1, -2) * size**-0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        exact = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ wide[2]
        exact.backward(g.double())
        errors.append(apart_at_worst(results, [exact.detach(), *map(gradient, wide)]))
    if not errors:
        raise UnavailableError(f"torch has no {path} attention on this device")
    return CheckOutcome(max(errors))


def adamw(device: torch.device, _path: str) -> CheckOutcome:
    """Check five steps of torch's fused AdamW: the parameters after them."""
    start = normal(1000, seed=1)
    grads = [normal(1000, seed=10 + i) for i in range(5)]
    parameter = nn.Parameter(start.to(device))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)
    w = start.double()
    m = torch.zeros(1000).double()
    v = torch.zeros(1000).double()
    for step, grad in enumerate(grads, 1):
        parameter.grad = grad.to(device)
        optimizer.step()
        m = 0.9 * m + 0.1 * grad.double()
        v = 0.999 * v + 0.001 * grad.double() ** 2
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return CheckOutcome(apart(parameter, w))


def narrow_products(device: torch.device, path: str) -> CheckOutcome:
    """Check the five matrix products of a LoRA at three ranks.

    If torch can choose between libraries, this also measures the speed of a square product.
    """
    if path == "hipblaslt" and os.environ.get("TORCH_BLAS_PREFER_HIPBLASLT") == "0":
        raise UnavailableError("TORCH_BLAS_PREFER_HIPBLASLT=0 turns it off")
    before = torch.backends.cuda.preferred_blas_library() if path else None
    if path:
        torch.backends.cuda.preferred_blas_library("cublaslt" if path == "hipblaslt" else "cublas")
    try:
        worst = max(_narrow(device, rank, dtype) for rank in RANKS for dtype in dtypes_of(device))
        figures = {"flops_per_second": products_per_second(device, torch.bfloat16)} if path else {}
    finally:
        if before is not None:
            torch.backends.cuda.preferred_blas_library(before)
    return CheckOutcome(worst, figures)


def _narrow(device: torch.device, rank: int, dtype: torch.dtype) -> float:
    x = normal(200, 320, seed=1, dtype=dtype)
    a = normal(rank, 320, seed=2, dtype=dtype)
    g = normal(200, 256, seed=3, dtype=dtype)
    b = normal(256, rank, seed=4, dtype=dtype)
    h = normal(200, rank, seed=5, dtype=dtype)
    dh = normal(200, rank, seed=6, dtype=dtype)
    products = ((x, a.t()), (h, b.t()), (g, b), (dh.t(), x), (g.t(), h))
    return max(apart(p.to(device) @ q.to(device), p.double() @ q.double()) for p, q in products)


def casts(device: torch.device, _path: str) -> CheckOutcome:
    """Check rounding to 16 bits at and around all kinds of ties, and functions of 16-bit numbers."""
    worst = 0.0
    ties = (torch.arange(0x3F80, 0x4080, dtype=torch.int32) << 16)[:, None] + torch.tensor([0x7FFF, 0x8000, 0x8001])
    numbers = ties.view(torch.float32).reshape(-1)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = numbers.to(device).to(dtype).cpu()
        worst = worst if torch.equal(rounded, numbers.to(dtype)) else float("inf")
        x = normal(4096, seed=1, dtype=dtype)
        for function in (torch.exp, torch.sigmoid, torch.tanh):
            worst = max(worst, apart(function(x.to(device)), function(x.double())))
    return CheckOutcome(worst)


def bitsandbytes(device: torch.device, _path: str) -> CheckOutcome:
    """Check that bitsandbytes decodes its packed weights to what their bytes mean."""
    if find_spec("bitsandbytes") is None:
        raise UnavailableError("bitsandbytes is not installed, and nothing here needs it")
    library: Any = import_module("bitsandbytes.functional")
    worst = 0.0
    for seed, quant_type in enumerate(("nf4", "fp4")):
        weight = normal(64, 256, seed=seed, dtype=torch.bfloat16).to(device)
        packed, state = library.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
        nested = (state.state2.absmax, state.offset)
        ours = PackedWeight(packed, state.absmax, (64, 256), 64, quant_type, torch.bfloat16, *nested)
        exact = decode_exactly(ours)
        worst = max(worst, apart(library.dequantize_4bit(packed, state), exact))
        far = (exact - weight.cpu().double()).abs().max().item() > 0.4 * weight.abs().max().item()
        worst = float("inf") if far else worst
    return CheckOutcome(worst)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def packed_linear(
    out_features: int, in_features: int, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Linear4bit, Tensor]:
    """A packed linear layer on `device`, and its weight as decoded in `dtype`, `(out, in) float64` on the CPU."""
    weight = encode(normal(out_features, in_features, seed=seed) * in_features**-0.5)
    layer = Linear4bit(in_features, out_features, bias=False, compute_dtype=dtype)
    layer.set_packed(weight.to(device))
    return layer, decode_exactly(weight).to(dtype).double()


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, device: torch.device
) -> list[Tensor]:
    """Run `function` on `device`, forward and backward; returns its result and the gradient of each input."""
    on_device = [tensor.to(device, copy=True).requires_grad_() for tensor in inputs]
    y = function(*on_device)
    y.backward(grad.to(device, y.dtype))
    return [y.detach(), *map(gradient, on_device)]


def gradient(tensor: Tensor) -> Tensor:
    """The gradient of a leaf after a backward pass.

    Raises:
        RuntimeError: the leaf has no gradient.
    """
    if tensor.grad is None:
        raise RuntimeError("the backward pass left no gradient")
    return tensor.grad


def apart_at_worst(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error, as `measure.apart` defines it, of several results."""
    return max(apart(result, wanted) for result, wanted in zip(results, expected, strict=True))
