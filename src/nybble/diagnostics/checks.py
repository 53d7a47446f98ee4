"""The table of computing checks: what each computes, its tolerance against float64, and what to do about a failure.

A new check is one entry. With an `operator` it runs once for each backend of that operator and decides whether
the backend may be taken. Errors are in units of the result's type (`measure.apart`) unless the entry says otherwise;
tolerances are four times and more what was measured (`bench/quality/doctor_tolerances.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nybble.diagnostics import blocks, layers, operators, rates
from nybble.diagnostics.measure import CheckOutcome, apart, normal


@dataclass(frozen=True)
class Check:
    """One check that computes something."""

    name: str
    compute: Callable[[torch.device, str], CheckOutcome]  # device, path ("" without an operator)
    tolerance: float | None = None  # None if the check only measures
    symptom: str = ""
    fix: str = ""  # one command
    thread: str = ""
    operator: str = ""  # in TABLE of nybble.kernels.dispatch
    is_quick: bool = True
    limit_seconds: float = 120.0  # includes compilation, which the first run on a GPU needs


def _first_kernel(device: torch.device, _path: str) -> CheckOutcome:
    x = normal(64, 64, seed=1)
    return CheckOutcome(apart(x.to(device) @ x.to(device).t(), x.double() @ x.double().t()))


def _training(device: torch.device, path: str) -> CheckOutcome:
    from nybble.diagnostics import trials  # transformers and PEFT take seconds to import

    return trials.training(device, path)


_OTHER_PATH = "nybble train .. --path {operator}=torch"
_REPORT = "nybble doctor --json > doctor.json  # and send it to the maintainers"

CHECKS = (
    Check(
        "first kernel",
        _first_kernel,
        32,
        "invalid device function, or wrong results everywhere",
        "pip install --force-reinstall torch",
        "ROCm/legacy-rocm-build#6600",
    ),
    Check(
        "16-bit types",
        layers.casts,
        4,
        "NaN, or a loss that does not fall",
        "nybble train .. --bnb_4bit_compute_dtype float32",
    ),
    Check(
        "4-bit decode",
        operators.decoding,
        8,
        "answers are garbage, and the loss of the base is far too high",
        _OTHER_PATH,
        "bitsandbytes-foundation/bitsandbytes#2087",
        "dequantize_4bit",
    ),
    Check(
        "4-bit encode",
        operators.encoding,
        1e-6,
        "packed models are worse than they should be",
        _OTHER_PATH,
        operator="quantize_4bit",
    ),
    Check(
        "few-row product",
        operators.product_of_few_rows,
        16,
        "garbage in generation, but not in training",
        _OTHER_PATH,
        operator="gemv_4bit",
    ),
    Check("4-bit linear", layers.linear, 16, "the loss does not fall", _REPORT),
    Check("PEFT's LoRA", layers.lora_by_peft, 8, "the loss does not fall", 'pip install -U "peft>=0.21"'),
    Check("row operators", blocks.row_operators, 8, "the loss does not fall, or is NaN", _OTHER_PATH, operator="rows"),
    Check("LoRA", blocks.adapted_linears, 8, "the loss does not fall", _REPORT),
    Check("MLP", blocks.adapted_mlp, 16, "the loss does not fall", _REPORT),
    Check(
        "torch's attention",
        layers.attention,
        8,
        "an impossibly low loss because the mask leaks, or NaN",
        "nybble train .. --path sdpa=math",
        "pytorch/pytorch#189849",
        "sdpa",
    ),
    Check(
        "attention of rows",
        blocks.attention_of_documents,
        8,
        "an impossibly low loss because a row attends to another row or to later tokens",
        _OTHER_PATH,
        operator="attend",
    ),
    Check("loss", blocks.loss_without_logits, 16, "the loss is wrong", _REPORT),
    Check("AdamW", layers.adamw, 16, "training diverges", "nybble train .. --optim adamw_torch"),
    Check(
        "narrow products",
        layers.narrow_products,
        32,
        "page fault, or zeros, in the backward pass of a LoRA",
        "export TORCH_BLAS_PREFER_HIPBLASLT=0 ROCBLAS_USE_HIPBLASLT=0",
        "ROCm/rocm-libraries#7992",
        "gemm",
    ),
    Check(
        "bitsandbytes",
        layers.bitsandbytes,
        8,
        "garbage or NaN in layers and optimizers of bitsandbytes, which Nybble's own layers do not use",
        'pip install -U "bitsandbytes>=0.50"',
        "bitsandbytes-foundation/bitsandbytes#2087",
    ),
    # The time relative to a copy of as many bytes: 1.1 with native code, 6 with the torch backend.
    Check(
        "speed of decoding",
        rates.speed_of_decoding,
        4,
        "training is slow",
        "pip install --force-reinstall --no-deps nybble  # with a C compiler, and with Triton for a GPU",
    ),
    Check("memory rate", rates.bandwidth),
    Check("product rate", rates.multiplication),
    # The largest difference of a step's loss, as a share of the first loss.
    Check(
        "20 steps",
        _training,
        0.02,
        "training gives wrong losses",
        _REPORT,
        is_quick=False,
        limit_seconds=300,
    ),
)
