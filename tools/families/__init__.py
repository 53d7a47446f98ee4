"""Tiny random models of every family that the installed transformers has, and a sweep of Nybble over them."""

from tools.families.tiny import families, tiny_config, write_tiny

__all__ = ["families", "tiny_config", "write_tiny"]
