"""AMD machine code, executed on a CPU."""

from amdgcn.machine import Kernel

__all__ = ["Kernel"]
