"""Operators with a schema, a fake and a reference; faster paths register on the same operators."""

from nybble.kernels.choices import LADDERS, Choice, ladder, take
from nybble.kernels.eager import is_eager
from nybble.kernels.ops import ENCODERS, dequantize, most_rows, multiply, multiply_dense, quantize
from nybble.kernels.paths import path_for, path_named, path_reasons, paths_taken, unavailable
from nybble.kernels.plain import LowRank

__all__ = [
    "ENCODERS",
    "LADDERS",
    "Choice",
    "LowRank",
    "dequantize",
    "is_eager",
    "ladder",
    "most_rows",
    "multiply",
    "multiply_dense",
    "path_for",
    "path_named",
    "path_reasons",
    "paths_taken",
    "quantize",
    "take",
    "unavailable",
]
