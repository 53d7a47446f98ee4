"""The native library: the compiled sources of `csrc/`, loaded once, and how its loops are shared among threads.

The library is compiled when the package is installed and loaded on first use. Without it (no C compiler then), and
where it was built from other sources than this package's, `unavailable` says why and the torch backend runs. A file
that an older checkout left behind would read the structures below wrongly, so it is refused by its ABI number.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

__all__ = [
    "ABI",
    "CONSTANTS",
    "DTYPES",
    "INSTRUCTION_SETS",
    "MANY_ROWS",
    "MAX_ROWS",
    "MAX_WIDTH",
    "find_library",
    "instruction_set",
    "load_library",
    "open_library",
    "set_instruction_set",
    "split",
    "unavailable",
]

ABI = 6  # NYBBLE_ABI of csrc/common.h: raise both with every change of a structure or signature
INSTRUCTION_SETS = ("plain C", "AVX2", "AVX-512", "AVX512-BF16")  # by their number in the library
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_ROWS = 8  # of a product straight from the codes
MANY_ROWS = 128  # of the same in bfloat16 instructions
MAX_WIDTH = 256  # of an attention head
# What both sides write down; a library that has other values is refused.
CONSTANTS = {
    "MAX_ROWS": MAX_ROWS,
    "MANY_ROWS": MANY_ROWS,
    "MAX_WIDTH": MAX_WIDTH,
    "FLOAT32": DTYPES[torch.float32],
    "FLOAT16": DTYPES[torch.float16],
    "BFLOAT16": DTYPES[torch.bfloat16],
}
_REBUILD = "rebuild it with: pip install --force-reinstall --no-deps nybble (in a checkout: pip install -e .)"
_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64


@cache
def unavailable() -> str | None:
    """Why the library cannot be used, in words; None if it can. Loads it once."""
    try:
        load_library()
    except OSError as error:
        return f"the native library could not be loaded: {error}"
    return None


@cache
def load_library() -> ctypes.CDLL:
    """The package's own library, its best instruction set chosen.

    Raises:
        OSError: it is not there, cannot be loaded, or was built from other sources.
    """
    library = open_library(find_library(Path(__file__).parent))
    library.nybble_set_isa(library.nybble_best_isa())
    library.nybble_set_team(_team())
    return library


def find_library(folder: Path) -> Path:
    """The file of the library in `folder`.

    Raises:
        FileNotFoundError: there is none for this Python.
    """
    candidates = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    for file in candidates:
        if file.is_file():
            return file
    raise FileNotFoundError("it was not built; install the package where a C compiler is available")


def open_library(file: Path) -> ctypes.CDLL:
    """Load a library and declare its functions.

    Raises:
        OSError: it cannot be loaded, or was built from other sources than this package's.
    """
    library = ctypes.CDLL(str(file))
    number = library.nybble_abi() if hasattr(library, "nybble_abi") else None
    if number != ABI:
        raise OSError(f"{file.name} has ABI {number}, this package needs ABI {ABI}; {_REBUILD}")
    library.nybble_constant.argtypes = (ctypes.c_char_p,)
    library.nybble_constant.restype = _Size
    for name, value in CONSTANTS.items():
        if library.nybble_constant(name.encode()) != value:
            raise OSError(f"{file.name} has another {name} than this package's {value}; {_REBUILD}")
    library.nybble_decode.argtypes = (_Pointer, _Size, _Pointer, _Size, _Size)
    library.nybble_multiply.argtypes = (_Pointer, _Size)
    library.nybble_set_team.argtypes = (_Pointer,)
    library.nybble_search.argtypes = (_Pointer, _Pointer, _Size, _Pointer, _Size, _Size)
    library.nybble_nested.argtypes = (_Pointer, _Pointer, _Pointer, _Size, _Size)
    library.nybble_nearest.argtypes = (_Pointer, _Pointer, _Pointer, _Size, _Size)
    for name in ("nybble_feed_back", "nybble_descend"):
        getattr(library, name).argtypes = (_Pointer, _Pointer, _Pointer, _Pointer, _Size, _Size)
        getattr(library, name).restype = None
    library.nybble_kquants.argtypes = (_Pointer, _Size, _Size)
    for name in (
        "nybble_decode",
        "nybble_set_team",
        "nybble_search",
        "nybble_nested",
        "nybble_nearest",
        "nybble_kquants",
    ):
        getattr(library, name).restype = None
    return library


def set_instruction_set(number: int) -> None:
    """Use one of `INSTRUCTION_SETS` from now on, -1 for the best; for tests and measurements.

    Raises:
        ValueError: this machine cannot run it.
    """
    library = load_library()
    if library.nybble_set_isa(library.nybble_best_isa() if number < 0 else number) < 0:
        raise ValueError(f"this machine cannot run instruction set {number}")


def instruction_set() -> str:
    """The best of `INSTRUCTION_SETS` that this machine can run."""
    return INSTRUCTION_SETS[load_library().nybble_best_isa()]


def _team() -> int | None:
    """Address of the function by which torch's own threads share a loop, where its OpenMP library shows it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _Pointer).value
    except (AttributeError, TypeError, OSError):  # another OpenMP library, or Windows: one thread multiplies
        return None


def split(run: Callable[[int, int], None], n: int, worth: int) -> None:
    """`run(first, last)` over all of range(n), on as many threads as the work is worth, this one among them."""
    parts = max(1, min(torch.get_num_threads(), worth, n))
    edges = [n * i // parts for i in range(parts + 1)]
    if parts == 1:
        run(0, n)
        return
    others = [_workers(os.getpid(), torch.get_num_threads()).submit(run, *edges[i : i + 2]) for i in range(1, parts)]
    run(*edges[:2])
    for other in others:
        other.result()


@cache
def _workers(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="nybble")
