"""Rows: read, recognise their shape, mark what is learned, count it, batch it."""

from nybble.data.batches import PadBatch, as_features
from nybble.data.encode import IGNORED, Example, encode_prompt
from nybble.data.prepare import Ledger, Prepared, prepare_rows
from nybble.data.rows import Rows, read_rows

__all__ = [
    "IGNORED",
    "Example",
    "Ledger",
    "PadBatch",
    "Prepared",
    "Rows",
    "as_features",
    "encode_prompt",
    "prepare_rows",
    "read_rows",
]
