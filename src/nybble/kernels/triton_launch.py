"""Launches of Triton kernels, whose compiled form is kept for each kind of arguments.

Triton looks with every launch for the variant of a kernel that fits: 14 us of the host on NVIDIA and 37 on AMD, which
asks each tensor for its size in Python. A training step launches some tens of kernels in each layer, always with the
same kinds of arguments. So what Triton compiled for them is launched by its own launcher directly; a kind that is new
goes through Triton. The kinds are those that Triton tells apart: types, addresses and sizes that are multiples of 16,
numbers that are 1 or need 64 bits, and tensors of up to 2 GiB, within which AMD counts in 32 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "as_bits"]

# Far below 2 GiB, whatever the type and the gaps between heads; larger ones are asked for the size of their memory.
_SMALL = 1 << 26
_2_GIB = (1 << 31) - 1
_INT32 = 1 << 31
_TRITONS_OWN = JITFunction.run


def as_bits(tensor: Tensor) -> Tensor:
    """bfloat16 as int16: the kernels round and widen it themselves."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


class Launch:
    """A kernel with its constants and the shape of its programs."""

    def __init__(self, kernel: Any, constants: dict[str, Any], reads_bits: bool = True) -> None:
        """`constants`: by name, in the kernel's order, and the compiler's options; `reads_bits`: see `as_bits`."""
        self._reads_bits = reads_bits
        self._kernel = kernel
        self._constants = constants
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, grid: tuple[int, int], *arguments: Any) -> None:
        """Launch `grid` programs over tensors and numbers, in the kernel's order; the first is a tensor."""
        device = arguments[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device, which need not be the tensors'
                self(grid, *arguments)
            return
        kind: list[Any] = [device.index]
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                small = argument.numel() < _SMALL or argument.untyped_storage().nbytes() <= _2_GIB
                kind += (argument.dtype, address & 15 == 0, small)
                values.append(address)
            else:
                if type(argument) is int:
                    kind.append(argument if argument == 1 else (argument & 15 == 0, -_INT32 <= argument < _INT32))
                values.append(argument)
        known = self._compiled.get(tuple(kind))
        # Who has put something in the place of Triton's own launch, such as an interpreter, sees every launch.
        if known is None or JITFunction.run is not _TRITONS_OWN:
            self._through_triton(grid, tuple(kind), arguments)
            return
        compiled, constants = known
        stream = driver.active.get_current_stream(device.index)
        compiled.run(
            *grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *constants
        )

    def _through_triton(self, grid: tuple[int, int], kind: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        given = (as_bits(a) if self._reads_bits and isinstance(a, Tensor) else a for a in arguments)
        compiled = self._kernel[grid](*given, **self._constants)
        if isinstance(self._kernel, JITFunction):  # else it is interpreted (TRITON_INTERPRET=1)
            names = self._kernel.arg_names[len(arguments) :]
            self._compiled[kind] = (compiled, tuple(self._constants[name] for name in names))
