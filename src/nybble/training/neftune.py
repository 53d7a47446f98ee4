"""NEFTune: noise on the embeddings of the training rows (Jain et al. 2023, "NEFTune: Noisy Embeddings Improve
Instruction Finetuning").

To the embeddings of a row of L tokens, each of d numbers, uniform noise in [-1, 1] times alpha / sqrt(L d) is added.
The noise follows from the seed, the optimizer step, the row and the place in it: a resumed training, another split of
the step, and rows that are packed or padded have the same noise. Evaluations have none.

The noise is made at the start of the forward pass, where no activation is alive yet, so it is never the highest moment
of a step, and the planner leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.nn.dropout_seed import mixed


class EmbeddingNoise:
    """Adds noise to what the input embeddings of a model return, within a `with` block."""

    def __init__(self, model: Any, alpha: float | None, seed: int) -> None:
        """`alpha`: None means no noise."""
        self._embeddings: nn.Module = model.get_input_embeddings()
        self._alpha = alpha
        self._seed = seed
        self._step = 0
        self._rows: list[tuple[int, int]] = []  # number and tokens of each row of the batch
        self._handle: Any = None

    def __enter__(self) -> EmbeddingNoise:
        if self._alpha is not None:
            self._handle = self._embeddings.register_forward_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def begin(self, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Before the forward pass of a micro-batch.

        Args:
            step: the optimizer step.
            rows: the number of each row, in the order of the batch.
            lengths: the tokens of each row.
        """
        self._step, self._rows = step, list(zip(rows, lengths, strict=True))

    def _add(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if not module.training or self._alpha is None:
            return None
        noise = torch.zeros_like(output, requires_grad=False)
        width, first = output.shape[-1], 0
        for place, (row, length) in enumerate(self._rows):
            generator = torch.Generator(output.device)
            generator.manual_seed(mixed(self._seed, self._step, row))
            values = torch.empty(length, width, device=output.device).uniform_(-1, 1, generator=generator)
            values *= self._alpha / math.sqrt(length * width)
            if output.shape[0] == 1:  # all rows in one sequence
                noise[0, first : first + length] = values
                first += length
            else:
                noise[place, :length] = values
        return output + noise
