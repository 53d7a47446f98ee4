"""Converts a tokenizer to GGUF: tokens, their types, merges or scores, special tokens, chat template.

Two kinds of tokenizer are supported. Byte-level BPE is stored with its merges and with llama.cpp's name for the way in
which text is split before merging. BPE over words that begin with a mark for the space (the kind of sentencepiece) is
stored with a score for each token instead: the earlier a merge, the higher the score; llama.cpp merges the pair with
the best score first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.data import adds_bos
from nybble.errors import ModelError

# How text is split before merging -> llama.cpp's name for it; "" is ByteLevel's own pattern, GPT-2's.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "": "gpt-2",
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
    # Qwen 3.5's: marks belong to the letters before them.
    (_LETTERS + r"\p{N}" + _REST)
    .replace(r"\p{L}+", r"[\p{L}\p{M}]+")
    .replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}"): "qwen35",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE_KIND = range(1, 7)  # llama.cpp's token types
_NO_SCORE = -1e6  # for tokens that no merge produces


@dataclass(frozen=True)
class Vocabulary:
    """The content of GGUF's fields `tokenizer.*`."""

    model: str  # "gpt2" or "llama"
    split: str  # llama.cpp's name for the way text is split
    tokens: list[str]
    kinds: list[int]
    merges: list[str]  # for "gpt2"
    scores: list[float]  # for "llama"
    adds_space: bool
    notes: tuple[str, ...] = ()  # what GGUF cannot express

    def write(self, writer: Any, tokenizer: Any, stop_tokens: Sequence[int]) -> None:
        """Add it, the special tokens and the chat template to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        eos = tokenizer.eos_token_id
        writer.add_eos_token_id(eos)
        for token in [token for token in stop_tokens if token != eos][:1]:
            writer.add_eot_token_id(token)  # a second token that ends an answer
        if tokenizer.bos_token_id is not None:
            writer.add_bos_token_id(tokenizer.bos_token_id)
        if tokenizer.unk_token_id is not None:
            writer.add_unk_token_id(tokenizer.unk_token_id)
        if tokenizer.pad_token_id is not None:
            writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_add_bos_token(adds_bos(tokenizer))
        writer.add_add_eos_token(False)
        if tokenizer.chat_template:
            writer.add_chat_template(tokenizer.chat_template)


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer, padded to the model's `size`.

    Raises:
        ModelError: GGUF or this export does not support the kind of tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("GGUF export needs a tokenizer.json; this model has only a slow tokenizer")
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        raise ModelError(f"GGUF export supports BPE tokenizers, this one is {content['model']['type']}")
    parts = _flat(content["pre_tokenizer"]) + _flat(content["normalizer"])
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(max(size, len(by_id)))]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in content["model"]["merges"]]
    is_bytes = any(part["type"] == "ByteLevel" for part in parts)
    kinds = _kinds(tokenizer, tokens, by_id)
    if is_bytes:
        joined = [" ".join(merge) for merge in merges]
        return Vocabulary("gpt2", _split_name(parts), tokens, kinds, joined, [], adds_space=False)
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    scores = [-float(rank[token]) if token in rank else _NO_SCORE for token in tokens]
    adds_space = any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )
    notes = []
    if any(part["type"] not in ("Prepend", "Metaspace") and not _is_space_mark(part) for part in parts):
        notes.append("the tokenizer rewrites text (e.g. runs of spaces) before it splits it, which GGUF cannot express")
    if _BYTE_KIND not in kinds:
        notes.append("the vocabulary has no byte tokens, so llama.cpp cannot read characters that are not in it")
    return Vocabulary("llama", "default", tokens, kinds, [], scores, adds_space, tuple(notes))


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with the steps of sequences in place of the sequences."""
    if part is None:
        return []
    return [step for inner in part.get("pretokenizers", part.get("normalizers", [])) for step in _flat(inner)] or [part]


def _is_space_mark(part: dict[str, Any]) -> bool:
    return bool(part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == "\u2581")


def says_alike(text: str, tokenizer: Any) -> bool:
    """Whether a tokenizer of sentencepiece's kind leaves the text unchanged and knows all of its words."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return True
    plain = normalizer.normalize_str(text).lstrip("\u2581").rstrip("\u2581")
    same = bool(plain == text.strip().replace(" ", "\u2581"))
    return same and tokenizer.unk_token_id not in list(tokenizer(text).input_ids)


def _split_name(parts: Sequence[dict[str, Any]]) -> str:
    patterns = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    name = _SPLITS.get(patterns[0] if patterns else "")
    if name is None or len(patterns) > 1:
        raise ModelError(
            f"GGUF export does not support how this tokenizer splits text ({str(patterns)[:120]}); it supports the "
            "patterns of GPT-2, Llama-3, Qwen-2 and Qwen-3.5"
        )
    return name


def _kinds(tokenizer: Any, tokens: Sequence[str], by_id: dict[int, str]) -> list[int]:
    added = tokenizer.added_tokens_decoder
    kinds = []
    for index, token in enumerate(tokens):
        if index not in by_id:
            kinds.append(_UNUSED)
        elif index == tokenizer.unk_token_id:
            kinds.append(_UNKNOWN)
        elif index in added:
            kinds.append(_CONTROL if added[index].special else _USER_DEFINED)
        else:
            kinds.append(_BYTE_KIND if _BYTE.fullmatch(token) else _NORMAL)
    return kinds
