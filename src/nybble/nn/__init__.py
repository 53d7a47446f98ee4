"""Layers and blocks: the 4-bit linear, experts in 4 bits, products with adapters, the gated MLP, norms, attention, the loss."""

from nybble.nn.experts4bit import Experts4bit, Stack
from nybble.nn.linear4bit import Linear4bit

__all__ = ["Experts4bit", "Linear4bit", "Stack"]
