"""Operators with a schema, a fake and a reference, and the backends that run them."""

from nybble.kernels.attention.ops import attend
from nybble.kernels.dispatch import Choice, dispatcher
from nybble.kernels.eager import is_eager
from nybble.kernels.ops4bit.ops import ENCODERS, dequantize, most_rows, multiply, multiply_dense, quantize
from nybble.kernels.ops4bit.torch import LowRank
from nybble.kernels.transfer import send

__all__ = [
    "ENCODERS",
    "Choice",
    "LowRank",
    "attend",
    "dequantize",
    "dispatcher",
    "is_eager",
    "most_rows",
    "multiply",
    "multiply_dense",
    "quantize",
    "send",
]
