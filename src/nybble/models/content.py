"""Hashes of weights by their content: every byte of every tensor, whatever files they are in and in which order.

The hash of a file is the sum, modulo 2^256, of a SHA-256 for each tensor: of its name, type, shape and bytes. So the
hash of a checkpoint is the sum over its files, and stays the same when it is cut into other shards or when a tool
writes other notes into the header. It tells damage and other weights apart; it is no defence against forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from nybble.models.folder_checks import read_header, weight_files
from nybble.storage.atomic import sha256_of

_PIECE = 1 << 20  # bytes that are read at a time


def content_hash(file: Path) -> str:
    """64 hexadecimal digits: of the tensors of a safetensors file, or of the bytes of any other file.

    A process reads a file once, and again if its size, time or inode has changed.
    """
    state = file.stat()
    return _read(file, (state.st_size, state.st_mtime_ns, state.st_ino))


@cache
def _read(file: Path, _state: tuple[int, ...]) -> str:
    if file.suffix != ".safetensors":
        return sha256_of(file)
    tensors, begin = read_header(file)
    with file.open("rb", buffering=0) as stream:
        parts = []
        for name, tensor in tensors.items():
            digest = hashlib.sha256(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            stream.seek(begin + tensor.first)
            for at in range(0, tensor.n_bytes, _PIECE):
                digest.update(stream.read(min(_PIECE, tensor.n_bytes - at)))
            parts.append(digest.hexdigest())
    return _sum(parts)


def weights_hash(folder: Path, hash_of: Callable[[Path], str] = content_hash) -> str:
    """64 hexadecimal digits that stand for all weights of the checkpoint in `folder`.

    Args:
        folder: of a model.
        hash_of: `content_hash`, or a function that remembers what it gave.
    """
    return _sum(hash_of(file) for file in weight_files(folder))


def _sum(hashes: Iterable[str]) -> str:
    return f"{sum(int(one, 16) for one in hashes) % (1 << 256):064x}"
