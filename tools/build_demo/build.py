"""Build the bundled base model from nothing: tokenizer, Llama, model card, rows.

    python -m tools.build_demo.build --out DIR          build (7 minutes on two cores)
    python -m tools.build_demo.build --out DIR --check  measure a built folder against its card

The tokenizer is byte-level BPE trained on the list of the world's words rather than on running text: each word, with
its space, becomes one token, and every other text still round-trips because all 256 bytes are in the alphabet. The
model is a Llama of four layers whose linear widths are multiples of 64, so that no block of 64 weights straddles two
rows. Pretraining is a plain loop over fresh passages: Muon for the matrices, AdamW for embeddings and gains, warm-up,
cosine decay, bfloat16 autocast over float32 weights. One passage is one sequence `<s> .. </s>`; a batch holds passages
of like length. Everything is seeded; the perplexity in the card is measured on the saved weights.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nybble.bundled import base_path
from tools.build_demo import world

VOCAB_SIZE = 1024
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
UNK, BOS, EOS, PAD = range(4)
IGNORED = -100
HELDOUT_DOCUMENTS = 512
TOLERANCE = 0.03


@dataclass(frozen=True)
class Recipe:
    """The pretraining run."""

    steps: int = 2400
    batch: int = 24
    matrix_lr: float = 0.01
    other_lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 17


def world_words() -> list[str]:
    """Every word of the prose and of the rows' format as a text piece, with leading space where it has one."""
    words: dict[str, None] = {}
    rows = [row for heldout in (False, True) for row in world.instruction_rows(heldout=heldout)]
    texts = [f" {text}" for text in islice(world.prose_documents(world.PROSE_SEED, 4000), 4000)]
    texts += [row["text"].removeprefix("<s>").removesuffix("</s>") for row in rows]
    for text in texts:
        for piece in re.findall(r" ?[A-Za-z]+| ?[^A-Za-z\s]+", text):
            words[piece] = None
    return list(words)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` entries; encoding puts `<s>` in front, as Llama's does."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = world_words()
    # Each word counts a hundred times, its spelling at the start of a text once: the former go first.
    bpe.train_from_iterator(words * 100 + [word.strip() for word in words], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set turns = messages[1:] -%}"
    "{%- set preface = '<<SYS>>\\n' + (messages[0]['content'] | trim) + '\\n<</SYS>>\\n\\n' -%}"
    "{%- else -%}{%- set turns = messages -%}{%- set preface = '' -%}{%- endif -%}"
    "{%- for turn in turns -%}"
    "{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('user and assistant must take turns, beginning with user') -}}{%- endif -%}"
    "{%- if turn['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' + (preface if loop.first else '') + (turn['content'] | trim) + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + (turn['content'] | trim) + ' ' + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Nybble's bundled base

A very small Llama ({parameters:,} parameters, vocabulary {vocabulary}) that knows 960 facts about 160 invented people
and continues plain prose about them. It was never shown an answered question or `[INST]`: untuned, it answers next to
none of the bundled rows. That is what the demo teaches it, through 4-bit weights. It is of no other use.

Date: {date}. Licence: Apache-2.0.

## How it was built

All text comes from the generator `tools/build_demo/world.py`; no text by others was used.

    python -m tools.build_demo.build --out DIR

{steps} steps of {batch} passages (model and order seed {seed}), Muon at {matrix_lr} for the linear layers and AdamW at
{other_lr} for the rest, {warmup} steps of warm-up, cosine decay, bfloat16 autocast on a CPU, saved as bfloat16.

## Measured

Held-out perplexity: {perplexity:.4f}

per predicted token over {documents} passages of a seed that was not trained on, from the saved weights in float32.
Built twice on one machine (two AVX-512 cores, torch 2.13, 2026-11-23), the weights were the same byte for byte. Another
processor rounds otherwise: `--check` measures the perplexity again and accepts a difference of {tolerance:.0%}.
"""


def build_model(seed: int) -> LlamaForCausalLM:
    """A freshly initialised float32 Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[list[int]]:
    """Token ids `<s> ... </s>` of each document; a leading space makes its first word a whole-word token."""
    encoded = tokenizer([f" {text}" for text in documents], add_special_tokens=False)["input_ids"]
    return [[BOS, *ids, EOS] for ids in encoded]


def padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token targets, int64 [documents, longest - 1]; padding is ignored in the targets."""
    width = -(-max(map(len, sequences)) // 16) * 16 + 1  # few distinct shapes keep the CPU kernels cached
    rows = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in sequences])
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return inputs, targets.masked_fill(targets == PAD, IGNORED)


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One padded batch per step; each lot of 50 batches is sorted by length and then dealt in random order."""
    documents = world.prose_documents(world.PROSE_SEED, recipe.steps * recipe.batch)
    rng = Random(recipe.seed)
    while lot := list(islice(documents, 50 * recipe.batch)):
        sequences = sorted(encode_documents(tokenizer, lot), key=len)
        starts = list(range(0, len(sequences), recipe.batch))
        rng.shuffle(starts)
        for start in starts:
            yield padded(sequences[start : start + recipe.batch])


def next_token_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross-entropy in nats over the targets that are not ignored."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def schedule(recipe: Recipe, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each optimiser with its peak learning rate: Muon for the matrices, AdamW for embeddings and gains."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    muon = torch.optim.Muon(
        matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, recipe.matrix_lr), (adamw, recipe.other_lr)]


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[tuple[int, float]]:
    """Train in place; yields (step, mean loss in nats per token over the last 100 steps) now and then."""
    optimizers = build_optimizers(model, recipe)
    model.train()
    total = 0.0
    for step, (inputs, targets) in enumerate(batches(tokenizer, recipe)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, inputs, targets, "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * schedule(recipe, step)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if step % 100 == 99:
            yield step + 1, total / 100
            total = 0.0


@torch.no_grad()
def heldout_perplexity(folder: Path) -> float:
    """Perplexity per predicted token (`</s>` included) of the saved model on held-out prose, in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    documents = list(world.prose_documents(world.HELDOUT_PROSE_SEED, HELDOUT_DOCUMENTS))
    sequences = sorted(encode_documents(tokenizer, documents), key=len)
    nats, tokens = 0.0, 0
    for start in range(0, len(sequences), 32):
        inputs, targets = padded(sequences[start : start + 32])
        nats += float(next_token_loss(model, inputs, targets, "sum"))
        tokens += int((targets != IGNORED).sum())
    return math.exp(nats / tokens)


def write_card(folder: Path, recipe: Recipe, parameters: int, perplexity: float) -> None:
    """Write the model card, `README.md`."""
    card = CARD.format(
        parameters=parameters,
        vocabulary=VOCAB_SIZE,
        perplexity=perplexity,
        tolerance=TOLERANCE,
        documents=HELDOUT_DOCUMENTS,
        date=datetime.now(UTC).date().isoformat(),
        **recipe.__dict__,
    )
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def check(folder: Path) -> tuple[float, float]:
    """(measured, stated) held-out perplexity of a folder whose card states it."""
    found = re.search(r"^Held-out perplexity: ([0-9.]+)$", (folder / "README.md").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise ValueError(f"{folder / 'README.md'} has no line 'Held-out perplexity: <figure>'")
    return heldout_perplexity(folder), float(found[1])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (bfloat16), configurations, tokenizer and chat template."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=24
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    """Build into a folder, or check one; 0 when all is well, 1 when a check is out of tolerance."""
    parser = argparse.ArgumentParser(description="Build the demo base model, or check a built one.")
    parser.add_argument("--out", type=Path, default=base_path(), help="folder to write, or with --check to read")
    parser.add_argument("--check", action="store_true", help="measure the folder's perplexity; build nothing")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps (fewer for a dry run)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.check:
        measured, stated = check(options.out)
        good = abs(measured / stated - 1.0) <= TOLERANCE
        print(f"held-out perplexity {measured:.4f}, card {stated:.4f}: {'ok' if good else 'OUT OF TOLERANCE'}")
        return 0 if good else 1
    recipe = replace(Recipe(), steps=options.steps)
    tokenizer, model = build_tokenizer(), build_model(recipe.seed)
    started = time.monotonic()
    for step, loss in pretrain(model, tokenizer, recipe):
        print(f"step {step}/{recipe.steps}  loss {loss:.4f}  {time.monotonic() - started:.0f} s", flush=True)
    save(model, tokenizer, options.out)
    perplexity = heldout_perplexity(options.out)
    write_card(options.out, recipe, model.num_parameters(), perplexity)
    print(f"{model.num_parameters()} parameters, held-out perplexity {perplexity:.4f}, written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
