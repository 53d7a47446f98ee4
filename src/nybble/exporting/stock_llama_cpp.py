"""A script for a process of its own: what llama.cpp makes of a GGUF file. It imports nothing of Nybble.

    python -I stock_llama_cpp.py FILE.gguf QUESTIONS.json REFERENCE.safetensors

QUESTIONS and REFERENCE are those of `stock.py`, and so is the JSON object that is printed; chats are texts that the
template has rendered already, and come back as token ids. llama.cpp is the one in the package cyllama, on the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from cyllama.llama import llama_cpp
from safetensors import safe_open


class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
    """cyllama 0.2.18 asks the model for `n_vocab`, which only its vocabulary has."""

    @property
    def n_vocab(self) -> int:
        """The number of tokens."""
        return int(self.get_vocab().n_vocab)


class Reader:
    """A file in llama.cpp, one sequence at a time."""

    def __init__(self, file: str, longest: int) -> None:
        settings = llama_cpp.LlamaModelParams()
        settings.n_gpu_layers = 0
        self.model = Model(file, settings, verbose=False)
        self.vocabulary = self.model.get_vocab()
        sizes = llama_cpp.LlamaContextParams()
        sizes.n_ctx = sizes.n_batch = sizes.n_ubatch = longest
        sizes.n_threads = sizes.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.LlamaContext(self.model, sizes, verbose=False)
        self.longest = longest

    def logits(self, ids: list[int], positions: list[int], first: int = 0) -> torch.Tensor:
        """What follows each of `positions` of `ids`, which stand in the sequence from `first` on."""
        if first == 0:
            self.context.kv_cache_clear()
        batch = llama_cpp.LlamaBatch(n_tokens=self.longest, embd=0, n_seq_max=1)
        wanted = set(positions)
        for place, token in enumerate(ids):
            batch.add(token, first + place, [0], place in wanted)
        self.context.decode(batch)
        return torch.stack([torch.tensor(self.context.get_logits_ith(place)) for place in positions])

    def continue_greedily(self, prompt: list[int], most: int) -> list[int]:
        """Ids after the prompt, the stop token included."""
        found: list[int] = []
        following = prompt
        while len(found) < most:
            first = 0 if not found else len(prompt) + len(found) - 1
            best = int(self.logits(following, [len(following) - 1], first).argmax())
            found.append(best)
            if self.vocabulary.is_eog(best):
                break
            following = [best]
        return found


def compare_rows(reader: Reader, rows: list[dict[str, Any]], reference_file: str, factor: float) -> dict[str, Any]:
    """KL and loss over the positions of `rows`."""
    kl_sum = kl_worst = loss_sum = reference_sum = 0.0
    count = 0
    with safe_open(reference_file, framework="pt") as file:
        stored = file.get_slice("log_probabilities")
        for row in rows:
            n = len(row["positions"])
            logits = reader.logits(row["ids"], [position - 1 for position in row["positions"]])
            ours = torch.log_softmax(factor * logits, dim=-1)
            theirs = stored[row["first"] : row["first"] + n]
            kl = (theirs.exp() * (theirs - ours[:, : theirs.shape[1]])).sum(dim=-1)
            labels = torch.tensor(row["ids"])[torch.tensor(row["positions"])].unsqueeze(1)
            kl_sum += float(kl.sum())
            kl_worst = max(kl_worst, float(kl.max()))
            loss_sum -= float(ours.gather(1, labels).sum())
            reference_sum -= float(theirs.gather(1, labels).sum())
            count += n
    return {
        "mean_kl": kl_sum / count,
        "worst_kl": kl_worst,
        "loss": loss_sum / count,
        "loss_reference": reference_sum / count,
    }


def main() -> None:
    """Read, compare, print."""
    answers_file, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    file, questions_file, reference_file = sys.argv[1:]
    asked = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    llama_cpp.llama_backend_init()
    lengths = [len(row["ids"]) for row in asked["rows"]]
    lengths += [len(prompt) + asked["max_new_tokens"] for prompt in asked["prompts"]]
    reader = Reader(file, max(lengths) + 1)
    answers: dict[str, Any] = compare_rows(reader, asked["rows"], reference_file, asked["logit_factor"])
    tokenize = reader.vocabulary.tokenize
    answers |= {
        "greedy": [reader.continue_greedily(prompt, asked["max_new_tokens"]) for prompt in asked["prompts"]],
        "texts": [tokenize(text, True, True) for text in asked["texts"]],
        "chats": [tokenize(text, False, True) for text in asked["chats"]],
        "foreign": sorted(name for name in sys.modules if name.partition(".")[0] == "nybble"),
    }
    print(json.dumps(answers), file=answers_file, flush=True)


if __name__ == "__main__":
    main()
