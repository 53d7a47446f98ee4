"""Compare twenty steps of training on the device with the same steps in float64 on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nybble.data import FlatBatch
from nybble.diagnostics.measure import CheckOutcome
from nybble.diagnostics.operators import decode_exactly
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model
from nybble.models.blocks import blocks_of
from nybble.nn import Linear4bit
from nybble.recipe import LoraSection, ModelSection, QuantizationSection

STEPS = 20
_RATE = 0.01
_ROWS = 4
_TOKENS = 24


def training(device: torch.device, _path: str) -> CheckOutcome:
    """Train a small Llama, packed and adapted as `nybble train` does.

    The error is the largest difference of a step's loss, as a share of the first loss. The reference decodes the packed
    weights by their definition and rounds them to the compute type as the layers do.
    """
    with TemporaryDirectory() as folder:
        _write_base(Path(folder))
        section = ModelSection(model_name_or_path=folder, device="cpu" if device.type == "cpu" else "cuda")
        detected = detect_device(section.device)
        model, report = load_model(find_model(section), "qlora", section, QuantizationSection(cache=False), detected)
    dtype = getattr(torch, report.compute_dtype)
    exact = _exactly(model, dtype)
    lora = LoraSection(r=8, lora_alpha=16, lora_dropout=0.0)
    torch.manual_seed(1)
    trained = attach(model, lora, "")
    reference = attach(exact, lora, "")
    values = {name: p.detach().cpu().double() for name, p in trained.named_parameters() if p.requires_grad}
    reference.double()
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values[name])
    losses = _losses(trained, device, torch.autocast(device.type, dtype), blocks_of(trained).flattened)
    expected = _losses(reference, torch.device("cpu"), nullcontext(), False)
    if expected[-1] > 0.8 * expected[0]:
        raise RuntimeError(f"the reference does not learn: its loss goes from {expected[0]:.3f} to {expected[-1]:.3f}")
    differences = [abs(a - b) if a == a else float("inf") for a, b in zip(losses, expected, strict=True)]
    return CheckOutcome(max(differences) / expected[0], {"first_loss": losses[0], "last_loss": losses[-1]})


def _write_base(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,  # gives logits of order 1, so that a wrong weight changes the loss
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _exactly(model: Any, dtype: torch.dtype) -> Any:
    """The same model in float64 on the CPU, with torch's linear layers."""
    from transformers import LlamaForCausalLM

    exact = LlamaForCausalLM(model.config.__class__(**_plain(model.config))).double()
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    values = {name: p.detach().cpu().double() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            layer = packed.get(name.removesuffix(".weight"))
            parameter.copy_(values[name] if layer is None else decode_exactly(layer.packed).to(dtype).double())
    return exact


def _plain(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] = config.to_dict()
    return {name: value for name, value in settings.items() if name not in ("quantization_config", "dtype")}


def _losses(
    model: nn.Module, device: torch.device, casting: AbstractContextManager[object], flattened: bool
) -> list[float]:
    ids = torch.arange(_ROWS * _TOKENS).view(_ROWS, _TOKENS) * 37 % 101
    batch: Any = {"input_ids": ids.to(device), "labels": ids.to(device)}
    if flattened:  # concatenate the rows into one sequence, as training does
        row_of = [{"input_ids": row, "labels": row} for row in ids.tolist()]
        batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in FlatBatch()([row_of]).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(STEPS):
        with casting:
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
