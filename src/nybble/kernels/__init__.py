"""Operators with a schema, a fake and a reference; faster paths register on the same operators."""

from nybble.kernels.ops import ENCODERS, dequantize, multiply, quantize
from nybble.kernels.paths import path_for, path_reasons, paths_taken

__all__ = ["ENCODERS", "dequantize", "multiply", "path_for", "path_reasons", "paths_taken", "quantize"]
