"""Operators with a schema, a fake and a reference; faster paths register on the same operators."""

from nybble.kernels.ops import dequantize

__all__ = ["dequantize"]
