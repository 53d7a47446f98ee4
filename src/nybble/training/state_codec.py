"""Nested state as JSON and tensors, so that no checkpoint needs a pickle.

Optimizers, schedules and generators consist of dicts, lists, numbers and tensors. A value that JSON does not have is
wrapped in an object with one key: `$tensor` (its name among the tensors), `$tuple`, `$dict` (pairs, for keys that are
not strings) or `$float` (not finite). Python writes floats so that reading them gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MARKS = ("$tensor", "$tuple", "$dict", "$float")


class CannotPackError(Exception):
    """A state holds what a checkpoint cannot hold."""


def pack(value: Any, tensors: dict[str, Tensor] | None, at: str = "") -> Any:
    """`value` as JSON; its tensors and arrays are copied to the host and added to `tensors` under where they stand.

    Without `tensors` nothing is copied: whether it can be packed is all that is asked.

    Raises:
        CannotPackError: something in it is neither plain data nor a plain tensor.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if type(value) in (Tensor, torch.nn.Parameter):
        if tensors is not None:
            tensors[at] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": at}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{at}.{number}") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key not in _MARKS for key in value):
            return {key: pack(inner, tensors, f"{at}.{key}".lstrip(".")) for key, inner in value.items()}
        if all(isinstance(key, str | int) for key in value):
            pairs = [[key, pack(inner, tensors, f"{at}.{key}".lstrip("."))] for key, inner in value.items()]
            return {"$dict": pairs}
    raise CannotPackError(f"{at or 'the state'} is a {type(value).__module__}.{type(value).__name__}")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given; arrays come back as tensors."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    mark = next(iter(packed), "") if len(packed) == 1 else ""
    readers: dict[str, Callable[[Any], Any]] = {
        "$tensor": lambda name: tensors[name],
        "$tuple": lambda items: tuple(unpack(item, tensors) for item in items),
        "$dict": lambda pairs: {key: unpack(inner, tensors) for key, inner in pairs},
        "$float": float,
    }
    if mark in readers:
        return readers[mark](packed[mark])
    return {key: unpack(inner, tensors) for key, inner in packed.items()}
