"""NVIDIA's PTX, executed on a CPU."""

from ptx.machine import Kernel, Memory, RaceError

__all__ = ["Kernel", "Memory", "RaceError"]
