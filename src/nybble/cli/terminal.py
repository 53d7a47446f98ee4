"""What is printed: text of others without control characters, and results as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# All control characters but tab and line feed, and what turns the direction of writing.
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with characters that steer a terminal, or turn its writing direction, as escapes."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, and nothing else."""
    print(json.dumps(content, ensure_ascii=False))
