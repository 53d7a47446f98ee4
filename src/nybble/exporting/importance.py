"""How much an error in each column of a weight matters: the mean square of its inputs on the user's rows.

The 16-bit model is run by stock transformers, whose linears are all called as modules. What does not fit into memory is
read from the folder when its turn comes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.exporting.stock import class_of

_SMALL = 1_000_000_000  # bytes of the files up to which the sums are those of a model in float32


@torch.no_grad()
def measure_importance(
    folder: Path, rows: Sequence[Sequence[int]], progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """Mean squares of the inputs of each linear layer, `(in_features,) float32`, by the name of its weight."""
    is_small = sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= _SMALL
    sums: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="nybble-importance-") as scratch:
        model: Any = (
            class_of(str(folder))
            .from_pretrained(
                folder, dtype=torch.float32 if is_small else "auto", device_map="auto", offload_folder=scratch
            )
            .eval()
        )

        def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                squares = inputs[0].reshape(-1, inputs[0].shape[-1]).float().square().sum(0).cpu()
                sums[name] = sums[name] + squares if name in sums else squares

            return add

        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(hook_for(f"{name}.weight"))
        for done, row in enumerate(rows):
            progress(done, len(rows))
            model(input_ids=torch.tensor([list(row)]), use_cache=False)
        progress(len(rows), len(rows))
    n_tokens = sum(len(row) for row in rows)
    return {name: total / n_tokens for name, total in sums.items()}
