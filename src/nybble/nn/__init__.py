"""Layers and blocks: the 4-bit linear, products with adapters, the gated MLP, norms, attention, the loss."""

from nybble.nn.linear4bit import Linear4bit

__all__ = ["Linear4bit"]
