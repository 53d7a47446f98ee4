"""The operators of 4-bit weights: decoding, products with a few rows, encoding."""
