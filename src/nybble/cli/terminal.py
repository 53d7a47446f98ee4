"""What is printed on stdout for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def print_json(content: Mapping[str, Any], *, flush: bool = False) -> None:
    """Print one JSON object on stdout, on one line."""
    print(json.dumps(content, ensure_ascii=False), flush=flush)
