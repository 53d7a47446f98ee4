"""Inputs that are nearly right: good files with a small change, of their bytes or of the JSON that they contain.

Every input follows from its seed number, so a failure can be reproduced.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

MOST_BYTES = 64 << 10
_WORDS = (
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b'"', b"'", b"\\", b"{", b"}", b"[", b"]"),
    *(b":", b",", b"- ", b"&a ", b"*a", b"<<: ", b"!!", b"%YAML", b"---\n", b"? ", b"| ", b"null", b"true", b"NaN"),
    *(b"-Infinity", b"1e999", b"-1", b"0", b"18446744073709551616", b"0x" + b"f" * 99, b"1:60:60", b"2024-13-45"),
    *(b"\\ud800", b"\\u0000", b"../", b"/dev/zero", b"__class__", b"{{", b"}}", b"{% for i in range(99999) %}"),
    *(b"{% endfor %}", b"hf_" + b"a" * 20, b"[INST]", b"[/INST]", b"<<SYS>>", b"</s>", b"<|im_start|>assistant\n"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "a", "\0", "\ud800", "x" * 5000, "../../etc/passwd", "(a+)+$", [], {}, [[]], [0] * 2000),
    *({"a": {"b": {"c": 1}}}, {"": None}, "1e9", "nf4", "float32", "bfloat16", "<script>alert(1)</script>", "$x^$"),
)
Change = Callable[[bytes, random.Random], bytes]


def changed(seeds: Sequence[bytes], number: int, change: Change) -> bytes:
    """Input `number` of a reader."""
    dice = random.Random(number)
    found = dice.choice(seeds)
    if dice.random() < 0.2:  # the front of one with the back of another
        other = dice.choice(seeds)
        found = found[: dice.randrange(len(found) + 1)] + other[dice.randrange(len(other) + 1) :]
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        found = change(found, dice)[:MOST_BYTES]
    return found


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    """One change anywhere."""
    at, kind = dice.randrange(len(data) + 1), dice.randrange(8)
    end = min(len(data), at + dice.choice((1, 2, 4, 16, 200)))
    if kind == 0:
        return data[:at] + bytes(dice.randrange(256) for _ in range(dice.choice((1, 4)))) + data[end:]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:end] + data[at:end] * dice.choice((1, 2, 50, 3000)) + data[end:]
    if kind == 4:
        return data[:at] + dice.choice(_WORDS) * dice.choice((1, 1, 1, 30, 2000)) + data[at:]
    if kind == 5 and data:
        flipped = data[at - 1] ^ (1 << dice.randrange(8))
        return data[: at - 1] + bytes((flipped,)) + data[at:] if at else data
    if kind == 6:
        return data[:at] + str(dice.choice(_VALUES)).encode("utf-8", "surrogatepass") + data[end:]
    return data[:at] + b"[" * dice.choice((1, 60, 5000)) + data[at:]


def change_json(data: bytes, dice: random.Random) -> bytes:
    """One change of a value, a name or the nesting; of bytes where it is no JSON any more, and now and then."""
    if dice.random() < 0.3:
        return change_bytes(data, dice)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, dice)
    try:
        return json.dumps(_changed_value(content, dice)).encode()
    except (ValueError, RecursionError):
        return data


def _changed_value(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        kind = dice.random()
        if kind < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if kind < 0.2:
            return {**value, str(dice.choice(_VALUES)): value[key]}
        return {**value, key: _changed_value(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.7:
        at = dice.randrange(len(value))
        return [*value[:at], _changed_value(value[at], dice), *value[at + 1 :]]
    if dice.random() < 0.5:
        return _like(value, dice)
    return [value] * dice.choice((1, 500)) if dice.random() < 0.1 else dice.choice(_VALUES)


def _like(value: Any, dice: random.Random) -> Any:
    """Another value of the same kind, which may well be allowed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * dice.choice((2, -1, 1000)) + dice.choice((0, 1))
    if isinstance(value, str):
        at = dice.randrange(len(value) + 1)
        return value[:at] + dice.choice(("", "x", " ", "</s>", "\u202e", "ü")) + value[at:]
    return value[::-1] if isinstance(value, list) else value


def change_lines(data: bytes, dice: random.Random) -> bytes:
    """One change of one line's JSON."""
    lines = data.split(b"\n")
    at = dice.randrange(len(lines))
    return b"\n".join([*lines[:at], change_json(lines[at], dice), *lines[at + 1 :]])


def change_safetensors(data: bytes, dice: random.Random) -> bytes:
    """One change of the header, whose length is put right again, or anywhere."""
    length = int.from_bytes(data[:8], "little")
    if dice.random() < 0.4 or length > len(data):
        return change_bytes(data, dice)
    header = change_json(data[8 : 8 + length], dice)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
