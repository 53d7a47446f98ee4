"""The tokenizer, with a pad token that is not its end token.

Padding with the end token hides every real end token from the loss: the model never learns to stop.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError, ModelError
from nybble.guard import MOST_JSON_BYTES, library_faults, read_object, shown
from nybble.models.folder_checks import read_numbers
from nybble.models.source import ModelSource, find_folder
from nybble.recipe import ModelSection

_MOST_BYTES = 128 << 20  # of a vocabulary; the largest known, of 262,144 tokens, has 33 million
_MOST_GROWTH = 1 << 14
_UNKNOWN = "\ue000 \U0001f9ff"  # rarely in a vocabulary: the unknown token is looked up, which may be missing
_SENTENCEPIECE = b"\n"  # a protocol buffer whose first field is a list of pieces; tiktoken's files begin with letters
_READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> its module
_NAMES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")


def load_tokenizer(source: ModelSource, model: ModelSection, n_embeddings: int = 0) -> Any:
    """The tokenizer of a model, with a pad token that is not its end token.

    An adapter may give the model more embeddings than its config says: `n_embeddings`.

    Raises:
        ModelError: there is none, it has no end token, or it has more tokens than the model.
    """
    name = model.tokenizer_name_or_path
    code = model.trust_remote_code
    folder = find_folder(name, with_weights=False, with_code=code) if name else source.folder
    tokenizer = _read(folder, code)
    size = max(tokenizer.get_vocab().values(), default=0) + 1
    if size > max(source.text_config.vocab_size, n_embeddings):
        raise ModelError(
            f"{folder}: token {size - 1:,}, the model has embeddings for {source.text_config.vocab_size:,}; "
            "give the tokenizer that belongs to the model"
        )
    return tokenizer


def find_tokenizer(model: ModelSection) -> tuple[Any, int | None]:
    """The tokenizer that `model` names and the context of its model where the folder says it; no weights are needed.

    Raises:
        ModelError: there is none, or it has no end token.
    """
    name = model.tokenizer_name_or_path or model.model_name_or_path
    if not name:
        raise ModelError("no tokenizer given; set --model_name_or_path (or --tokenizer_name_or_path) to a folder")
    revision = None if model.tokenizer_name_or_path else model.model_revision
    folder = find_folder(name, revision, with_weights=False, with_code=model.trust_remote_code)
    return _read(folder, model.trust_remote_code), _context(folder)


def _context(folder: Path) -> int | None:
    file = folder / "config.json"
    content = read_numbers(file) if file.is_file() else {}
    text = content.get("text_config")  # of a multimodal model
    limit = {**content, **(text if isinstance(text, dict) else {})}.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def _read(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    advice = "give a folder with tokenizer.json"
    for file in folder.iterdir():
        is_whole = file.suffix == ".model" or file.name in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
        most = _MOST_BYTES if is_whole else MOST_JSON_BYTES
        if file.name.startswith(_NAMES) and file.stat().st_size > most:
            raise ModelError(f"{file}: {file.stat().st_size:,} bytes; allowed are {most:,}; {advice}")
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_object(settings, ModelError, advice).get("auto_map") and not trust_remote_code:
        advice = "it brings Python code along (auto_map): read that, then say --trust_remote_code"
    _check_sentencepiece(folder)
    with library_faults(f"{folder}: no usable tokenizer", ModelError, advice):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_growth(folder, tokenizer)
    with library_faults(f"{folder}: the tokenizer cannot take every text", ModelError, advice):
        tokenizer(_UNKNOWN)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no end token, so a model could never learn to stop; set eos_token"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _padding(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _check_sentencepiece(folder: Path) -> None:
    """Check that what reads a SentencePiece model is installed, where the folder has nothing else.

    Raises:
        CannotRunError: it is not; transformers would name a package for another kind of file.
    """
    if (folder / "tokenizer.json").is_file():
        return
    for file in sorted(folder.glob("*.model")):
        with file.open("rb") as stream:
            is_sentencepiece = stream.read(1) == _SENTENCEPIECE
        missing = [package for package, module in _READERS.items() if not _is_installed(module)]
        if is_sentencepiece and missing:
            raise CannotRunError(
                f"{file} is a SentencePiece model, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                f"not installed; pip install {' '.join(missing)}, or give a folder with tokenizer.json"
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def _check_growth(folder: Path, tokenizer: Any) -> None:
    """Check that steps which rewrite text do not make it thousands of times longer.

    Raises:
        ModelError: they could.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in (getattr(backend, name, None) for name in ("normalizer", "decoder")):
        growth = _growth(json.loads(part.__getstate__())) if part is not None else 1
        if growth > _MOST_GROWTH:
            raise ModelError(
                f"{folder}: tokenizer.json makes text up to {shown(growth)} times longer; give another one"
            )


def _growth(step: Any) -> int:
    """How many characters a single one can become."""
    growth = 1
    for inner in step.get("normalizers", step.get("decoders", [])):
        growth *= _growth(inner)
    put, taken = step.get("content", ""), step.get("pattern", {})
    put = put if isinstance(put, str) else ""
    if isinstance(taken, dict) and taken.get("String"):
        return max(growth, -(-len(put) // len(taken["String"])))
    # A regular expression may match nothing, between any two characters.
    return max(growth, 1 + len(put) if put else 1, len(step.get("prepend", "")))


def _padding(tokenizer: Any) -> str:
    """A token to pad with: the unknown token, or the first unused special token."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for token in (tokenizer.unk_token, *tokenizer.all_special_tokens):
        if token is not None and token not in taken:
            return str(token)
    # Padded positions are masked in loss and attention, so the identity of the token does not matter.
    return str(tokenizer.convert_ids_to_tokens(0))
