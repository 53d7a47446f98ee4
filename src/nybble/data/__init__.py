"""Rows: read them, detect their shape, label the tokens to learn, count them, and build batches."""

from nybble.data.batches import FlatBatch, Groups, PadBatch, pack_rows, packs_of
from nybble.data.encode import Example
from nybble.data.ledger import Ledger
from nybble.data.prepare import Prepared, examine_rows, prepare_rows, rows_cache
from nybble.data.prompts import encode_chat, encode_follow_up, encode_prompt, question_form
from nybble.data.rows import Rows, read_rows
from nybble.data.shapes import Turn
from nybble.data.show import ShownRow, Stretch, show_rows
from nybble.data.store import Examples
from nybble.data.supervised import supervised
from nybble.data.templates import clock_arguments, fixed_clock, render_chat
from nybble.data.tokens import IGNORED, adds_bos

__all__ = [
    "IGNORED",
    "Example",
    "Examples",
    "FlatBatch",
    "Groups",
    "Ledger",
    "PadBatch",
    "Prepared",
    "Rows",
    "ShownRow",
    "Stretch",
    "Turn",
    "adds_bos",
    "clock_arguments",
    "encode_chat",
    "encode_follow_up",
    "encode_prompt",
    "examine_rows",
    "fixed_clock",
    "pack_rows",
    "packs_of",
    "prepare_rows",
    "question_form",
    "read_rows",
    "render_chat",
    "rows_cache",
    "show_rows",
    "supervised",
]
