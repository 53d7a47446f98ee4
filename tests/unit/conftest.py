"""What the tests of rows and masks share: a tokenizer whose every token is known bytes, and the oracle it allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nybble.data import IGNORED, Example, Prepared, prepare_rows
from nybble.data.tree import unfold
from nybble.recipe import DataSection, EvaluationSection

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}  # GPT-2's alphabet


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[], Any]:
    """`byte_tokenizer()` -> a new byte-level BPE tokenizer with some merges, which puts `<s>` first."""
    return _make


@pytest.fixture
def tok(byte_tokenizer: Callable[[], Any]) -> Any:
    """A byte-level tokenizer of this test's own: preparing rows sets its chat template."""
    return byte_tokenizer()


def _make() -> Any:
    unk, bos, eos, pad = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Is the sky blue? Yes, it is. Be brief. user assistant system"] * 3, trainer)
    begin = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )


@pytest.fixture
def prepare(tmp_path: Path, tok: Any) -> Callable[..., Prepared]:
    """`prepare(rows, **settings)` -> the rows as a run would take them, nothing held out unless asked for."""

    def run(rows: list[dict[str, Any]], tokenizer: Any = None, seed: int = 0, **settings: Any) -> Prepared:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        cache, watch = settings.pop("cache", None), settings.pop("watch", None)
        objective = settings.pop("objective", "sft")
        evaluation = EvaluationSection(max_eval_rows=settings.pop("max_eval_rows", 500))
        data = DataSection(**{"dataset_name": str(file), "eval_fraction": 0, **settings})
        return prepare_rows(data, evaluation, tokenizer or tok, seed, cache, watch, objective)

    return run


@pytest.fixture
def learns(prepare: Callable[..., Prepared], tok: Any) -> Callable[..., Prepared]:
    """`learns(row, prompt, answer, prompt, answer, .., **settings)`: the row becomes these texts, one after the other,
    and of them every second one is learned. Each id, each label and the prompt are checked, by bytes."""

    def run(row: dict[str, Any], *segments: str, tokenizer: Any = None, **settings: Any) -> Prepared:
        done = prepare([row], tokenizer=tokenizer, **settings)
        _assert_learned(done.train[0], tokenizer or tok, *segments)
        return done

    return run


@pytest.fixture(scope="session")
def contexts_of() -> Callable[..., list[tuple[str, str]]]:
    """`contexts_of(example, tokenizer)` -> the text of each context in it, and the text that is learned in it."""

    def run(example: Example, tokenizer: Any) -> list[tuple[str, str]]:
        rows = unfold(example.input_ids, example.labels, example.segments)
        return [(tokenizer.decode(ids), tokenizer.decode([i for i in labels if i != IGNORED])) for ids, labels in rows]

    return run


def _assert_learned(example: Example, tokenizer: Any, *segments: str) -> None:
    special = set(tokenizer.all_special_tokens)
    spoken = [
        piece.encode() if piece in special else bytes(BYTE_OF[char] for char in piece)
        for piece in tokenizer.convert_ids_to_tokens(example.input_ids)
    ]
    assert b"".join(spoken).decode() == "".join(segments)
    learned_at = [number % 2 == 1 for number, text in enumerate(segments) for _ in text.encode()]
    begins = [sum(map(len, spoken[:i])) for i in range(len(spoken))]
    wanted = [i if learned_at[b] else IGNORED for i, b in zip(example.input_ids, begins, strict=True)]
    assert example.labels == wanted
    assert tokenizer.decode([i for i in example.labels if i != IGNORED]) == "".join(segments[1::2])
    last_answer = len(segments) - (2 if len(segments) % 2 else 1)
    assert tokenizer.decode(example.prompt_ids) == "".join(segments[:last_answer])
    assert example.n_trained == sum(label != IGNORED for label in wanted[1:])
