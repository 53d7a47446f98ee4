"""Layers and blocks: 4-bit linears and experts, products with adapters, the gated MLP, norms, attention, the loss."""

from nybble.nn.experts4bit import Experts4bit, Stack
from nybble.nn.linear4bit import Linear4bit

__all__ = ["Experts4bit", "Linear4bit", "Stack"]
