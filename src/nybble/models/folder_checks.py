"""Checks of a model folder that read only its small files and the headers of its large ones.

Building a config or a model takes memory in proportion to the numbers in the config. So the numbers are checked first,
and no model is loaded that would hold much more than its files do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.errors import ModelError
from nybble.guard import as_path, library_faults, parse_object, read_object, shown

_AGAIN = "download it again"
_MOST_HEADER_BYTES = 64 << 20  # 400,000 tensors
# Pattern of a name in a config -> the largest number that it may hold; the first match counts.
_CEILINGS = (
    (re.compile("beam|sequences"), 1 << 6),  # in generation each has its own keys and values
    (re.compile("vocab"), 1 << 24),
    (re.compile("layers|n_layer|depth"), 1 << 11),  # each is built, module by module
    (re.compile("layer|block|head|expert|label"), 1 << 16),
    (re.compile("position|length|window|ctx|seq|token|_id"), 1 << 31),  # contexts, and numbers of tokens
    (re.compile("size|dim|embd|inner|rank|kernel|width|state"), 1 << 24),
    (re.compile(""), 1 << 53),
)
# A byte of weights stands for up to two parameters (4 bits), and as many again that a model ties or computes.
_PARAMETERS_A_BYTE = 4
_SMALL = 1 << 20  # parameters that are allowed in any case


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    first: int  # byte, counted from the end of the header
    last: int

    @property
    def n_bytes(self) -> int:
        """The size of the tensor in the file."""
        return self.last - self.first


def read_header(file: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of a safetensors file, and the byte at which they start; the file is checked to be complete.

    Raises:
        ModelError: the file is damaged, cut short, or not a safetensors file.
    """
    from safetensors import safe_open

    # The library checks types, shapes, offsets, overlaps and the length of the file.
    with library_faults(f"{file} is damaged or cut short", ModelError, _AGAIN), safe_open(file, framework="numpy"):
        pass
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _MOST_HEADER_BYTES:
            raise ModelError(f"{file}: a header of {length:,} bytes; allowed are {_MOST_HEADER_BYTES:,}; {_AGAIN}")
        try:
            found = parse_object(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file} is damaged (header: {error}); {_AGAIN}") from error
    found.pop("__metadata__", None)
    return {
        name: StoredTensor(facts["dtype"], tuple(facts["shape"]), *facts["data_offsets"])
        for name, facts in found.items()
    }, 8 + length


def check_numbers(file: Path, content: Mapping[str, Any]) -> None:
    """Check that the numbers of a config are ones that a model can have.

    Raises:
        ModelError: one of them is not.
    """
    level: list[Any] = [content]
    while level:
        for settings in level:
            for name, value in settings.items() if isinstance(settings, dict) else ():
                ceiling = next(ceiling for pattern, ceiling in _CEILINGS if pattern.search(name))
                if type(value) is int and abs(value) > ceiling:
                    raise ModelError(f"{file}: {name} is {shown(value)}; allowed is up to {ceiling:,}; {_AGAIN}")
        level = [v for s in level for v in (s.values() if isinstance(s, dict) else s) if isinstance(v, dict | list)]


def read_numbers(file: Path) -> dict[str, Any]:
    """The content of a config file, after its numbers were checked.

    Raises:
        ModelError: the file is damaged, or contains a number that no model has.
    """
    content = read_object(file, ModelError, _AGAIN)
    check_numbers(file, content)
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from: the single one, or those that the index names.

    Raises:
        ModelError: there are none, only pickles, or the index is damaged or names files elsewhere.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        if any(path for ending in ("bin", "pt", "pth", "ckpt", "pkl") for path in folder.glob(f"*.{ending}")):
            raise ModelError(
                f"{folder} contains weights only as pickle files, which can run code; convert them to safetensors"
            )
        raise ModelError(
            f"{folder} contains neither model.safetensors nor an index of several files; give a folder with weights"
        )
    names = read_object(index, ModelError, _AGAIN, _MOST_HEADER_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: not a safetensors index (weight_map); {_AGAIN}")
    needed = sorted(set(names.values()))
    for name in needed:
        if as_path(name, ModelError).name != name or not name.endswith(".safetensors"):
            why = "a pickle can run code" if not name.endswith(".safetensors") else "it is outside the folder"
            raise ModelError(f"{index}: names {shown(name)}; allowed are .safetensors files in its folder ({why})")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: missing shards: {len(missing)} of {len(needed)}, e.g. {shown(missing[0])}; {_AGAIN}"
        )
    return [folder / name for name in needed]


def check_fits(folder: Path, config: Any, tensors: Sequence[StoredTensor]) -> None:
    """Check that the model that `config` describes is about as large as the files are.

    Raises:
        ModelError: it is much larger, or `config` describes no model.
    """
    from nybble.models.skeleton import model_without_weights  # brings torch

    n_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(n_layers, int) and n_layers > len(tensors):
        raise ModelError(
            f"{folder}/config.json: {n_layers:,} layers (num_hidden_layers), {len(tensors):,} tensors in the files; "
            f"{_AGAIN}"
        )
    what = f"{folder}/config.json: no model can be built from it"
    with library_faults(what, ModelError, _AGAIN):
        model = model_without_weights(config)
        needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    if needed > _PARAMETERS_A_BYTE * n_bytes + _SMALL:
        raise ModelError(
            f"{folder}/config.json: describes {needed:,} parameters, but the files contain {n_bytes:,} bytes; {_AGAIN}"
        )
