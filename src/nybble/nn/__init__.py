"""Layers: the 4-bit linear."""

from nybble.nn.linear import Linear4bit

__all__ = ["Linear4bit"]
