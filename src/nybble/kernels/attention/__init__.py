"""Attention over the documents of a flattened batch."""
