"""Verifies that an exported model is what was trained, with figures from stock transformers in a fresh process.

The reference is the adapter on its base, as it was trained. On held-out rows the distributions at every trained
position are compared (KL, loss); on held-out prompts, the greedy continuations and whether they stop. The tokenizer,
chat template and generation config are those of the exported folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.data import IGNORED, Example, clock_arguments, render_chat
from nybble.data.tree import unfold
from nybble.exporting.fresh import run_fresh
from nybble.models import base_of
from nybble.training import evaluation_mode

# Texts of several kinds, where a model is compared with itself and no rows are there.
TEXTS = (
    "Hello, world! How are you today?",
    "Once upon a time there was a little girl. She went to the park.",
    "The quick brown fox jumps over 13 lazy dogs; it's 3.14 o'clock.",
    "def add(a, b):\n    return a + b\n",
    "Über naïve façades: 東京, Москва, 🙂.",
)
N_PROMPTS = 8
_REFERENCE_BYTES = 256 << 20  # of stored distributions: 2,097 positions of a 32,000-token vocabulary
# How far a file's loss in llama.cpp, which rounds inputs of products to 8 bits, may be from that in stock transformers:
# nats a position, or a share of what quantizing changes.
MOST_LOSS_BESIDE_STOCK = 0.02
_SHARE_BESIDE_STOCK = 0.5
_MOST_LOSS_OF_STOPS = 0.5  # share; a small change of the weights moves some stops past max_new_tokens


@dataclass(frozen=True)
class Limits:
    """How far an exported model may be from the adapter on its base."""

    mean_kl: float = 0.01  # nats a position; applies to the base that was trained on, where only rounding differs
    loss_gap: float = 0.02  # nats a position; applies to every target


@dataclass(frozen=True)
class Verification:
    """The figures of an exported folder, compared with the adapter on its base."""

    target: str
    mean_kl: float  # KL(adapter on base || written), nats a position
    worst_kl: float
    loss: float
    loss_reference: float
    n_rows: int
    n_positions: int
    n_prompts: int
    greedy_equal: int  # prompts whose whole continuation is the same
    stopped: int  # prompts whose continuation ends with a stop token
    stopped_reference: int
    faults: tuple[str, ...]  # why it is not verified

    @property
    def loss_gap(self) -> float:
        """The difference of the losses; negative if the exported model is the better one."""
        return self.loss - self.loss_reference

    @property
    def verified(self) -> bool:
        """Whether it is the model that was trained, within the limits."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {**asdict(self), "loss_gap": self.loss_gap, "verified": self.verified}


class Reference:
    """The answers of the adapter on its base, stored in a temporary folder. Use it as a context manager."""

    def __init__(self, rows: Sequence[Example], max_new_tokens: int, stop_tokens: Sequence[int]) -> None:
        """Choose the rows to compare on; their number is limited by the bytes that their distributions take."""
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.stop_tokens = set(stop_tokens)
        self.prompts = [row.prompt_ids for row in rows if row.prompt_ids][:N_PROMPTS]
        self._chosen: list[dict[str, Any]] = []

    def __enter__(self) -> Reference:
        self._scratch = tempfile.TemporaryDirectory(prefix="nybble-verify-")
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    def capture(self, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
        """Store the answers of `model`, the adapter on its base, in evaluation mode."""
        from safetensors.torch import save_file

        self._choose(model.config.get_text_config().vocab_size)
        device = next(model.parameters()).device
        self.logit_factor: float = getattr(base_of(model), "logit_factor", 1.0)
        with evaluation_mode(model, dtype):
            parts = []
            for row in self._chosen:
                ids = torch.tensor([row["ids"]], device=device)
                at = torch.tensor(row["positions"], device=device) - 1
                logits = model(input_ids=ids, use_cache=False).logits[0, at]
                parts.append(torch.log_softmax(logits.float(), dim=-1).cpu())
            self.greedy = [self._continue(model, tokenizer, prompt, device) for prompt in self.prompts]
        save_file({"log_probabilities": torch.cat(parts)}, self._file("reference.safetensors"))
        turns = [{"role": "user", "content": "Hello </s> <|im_end|>"}, {"role": "assistant", "content": "Hi"}]
        self.chats = [[*turns, turns[0]]] if tokenizer.chat_template else []
        self.texts = [tokenizer.decode(row["ids"]) for row in self._chosen[:N_PROMPTS]] + [" two  spaces\n\tünïcødé 🙂"]
        self._tokenized = [tokenizer(text).input_ids for text in self.texts]
        self._rendered = [render_chat(tokenizer, chat, "a chat", asks=True) for chat in self.chats]
        self._tokenized_chats = [tokenizer(text, add_special_tokens=False).input_ids for text in self._rendered]

    def measure(
        self, folder: Path, target: str, limits: Limits, device: str, max_memory: Mapping[str, int] | None = None
    ) -> Verification:
        """Measure the folder as stock transformers reads it, in a process that imports nothing of Nybble.

        Raises:
            CannotRunError: that process ran out of memory or lacks a library.
            NybbleError: stock transformers cannot read the folder.
        """
        answers = self._ask("stock.py", folder, self.chats, device, max_memory)
        faults = []
        stopped, stopped_reference = (self._n_stopped(ids) for ids in (answers["greedy"], self.greedy))
        measured = Verification(
            target=target,
            **{name: answers[name] for name in ("mean_kl", "worst_kl", "loss", "loss_reference")},
            n_rows=len(self._chosen),
            n_positions=sum(len(row["positions"]) for row in self._chosen),
            n_prompts=len(self.prompts),
            greedy_equal=sum(a == b for a, b in zip(answers["greedy"], self.greedy, strict=True)),
            stopped=stopped,
            stopped_reference=stopped_reference,
            faults=(),
        )
        # Written so that NaN is a fault.
        if target == "dequantized" and not measured.mean_kl <= limits.mean_kl:
            faults.append(f"mean KL {measured.mean_kl:.4f} is above {limits.mean_kl:g}")
        if not measured.loss_gap <= limits.loss_gap:
            faults.append(f"the loss gap to the adapter is {measured.loss_gap:+.4f}, above {limits.loss_gap:+g}")
        if stopped < _MOST_LOSS_OF_STOPS * stopped_reference:
            faults.append(f"{stopped} of {len(self.prompts)} answers stop; the adapter's: {stopped_reference}")
        if answers["texts"] != self._tokenized or answers["chats"] != self._rendered:
            faults.append("the exported tokenizer or chat template gives other tokens")
        return Verification(**{**asdict(measured), "faults": tuple(faults)})

    def measure_llama_cpp(self, file: Path, stock: Mapping[str, Any]) -> dict[str, Any]:
        """Measure a GGUF file as llama.cpp computes it, beside `stock`, the figures of stock transformers on the file.

        Raises:
            CannotRunError: the process ran out of memory, or there is no llama.cpp here.
            NybbleError: llama.cpp cannot read the file.
        """
        answers = self._ask("stock_llama_cpp.py", file, self._rendered)
        stopped, stopped_reference = (self._n_stopped(ids) for ids in (answers["greedy"], self.greedy))
        faults = []
        # Written so that NaN is a fault.
        allowed = max(MOST_LOSS_BESIDE_STOCK, _SHARE_BESIDE_STOCK * stock["mean_kl"])
        if not abs(answers["loss"] - stock["loss"]) <= allowed:
            faults.append(
                f"in llama.cpp the loss is {answers['loss']:.4f}, in stock transformers {stock['loss']:.4f}; allowed "
                f"is a difference of {allowed:.4f}"
            )
        if answers["texts"] != self._tokenized or answers["chats"] != self._tokenized_chats:
            faults.append("llama.cpp's tokenizer gives other token ids")
        if stopped < _MOST_LOSS_OF_STOPS * stopped_reference:
            faults.append(
                f"in llama.cpp {stopped} of {len(self.prompts)} answers stop; the adapter's: {stopped_reference}"
            )
        return {
            **{name: answers[name] for name in ("mean_kl", "worst_kl", "loss", "loss_reference")},
            "n_prompts": len(self.prompts),
            "greedy_equal": sum(a == b for a, b in zip(answers["greedy"], self.greedy, strict=True)),
            "stopped": stopped,
            "stopped_reference": stopped_reference,
            "faults": faults,
        }

    def _file(self, name: str) -> Path:
        return Path(self._scratch.name) / name

    def _choose(self, vocabulary: int) -> None:
        left = max(1, _REFERENCE_BYTES // (4 * vocabulary))
        first = 0
        for ids, labels in (path for row in self.rows for path in unfold(row.input_ids, row.labels, row.segments)):
            positions = [i for i, label in enumerate(labels) if i and label != IGNORED][:left]
            if positions:
                self._chosen.append({"ids": ids, "first": first, "positions": positions})
                first, left = first + len(positions), left - len(positions)

    def _continue(self, model: Any, tokenizer: Any, prompt: list[int], device: torch.device) -> list[int]:
        ids = torch.tensor([prompt], device=device)
        produced = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        return [int(i) for i in produced[0, len(prompt) :]]

    def _n_stopped(self, continuations: Sequence[Sequence[int]]) -> int:
        return sum(bool(ids) and ids[-1] in self.stop_tokens for ids in continuations)

    def _ask(
        self,
        script: str,
        subject: Path,
        chats: Sequence[Any],
        device: str = "cpu",
        max_memory: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        asked = {
            "rows": self._chosen,
            "prompts": self.prompts,
            "texts": self.texts,
            "chats": chats,
            "clock": clock_arguments("strftime_now"),
            "max_new_tokens": self.max_new_tokens,
            "max_memory": max_memory,
            "logit_factor": self.logit_factor,
        }
        self._file("questions.json").write_text(json.dumps(asked), encoding="utf-8")
        files = [self._file(name) for name in ("questions.json", "reference.safetensors")]
        return run_fresh(script, subject, *files, device=device)
