"""Show the ledger of the rows to people, one line per count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.units import format_count, format_share

_LINES: tuple[tuple[str, str], ...] = (
    ("shape of the rows", "shape"),
    ("form of the prompts", "prompt_form"),
    ("rows read", "rows_read"),
    ("rows trained on", "rows_used"),
    ("rows held out", "rows_held_out"),
    ("rows dropped", "rows_dropped"),
    ("rows over max_length", "rows_over_max_length"),
    ("rows cut at max_length", "rows_truncated"),
    ("rows split", "rows_split"),
    ("examples", "examples"),
    ("rows that repeat an earlier row", "rows_duplicate"),
    ("rows with several answers", "rows_multi_turn"),
    ("answers to learn", "turns"),
    ("end tokens learned", "stop_tokens_trained"),
    ("end tokens lost to max_length", "stop_tokens_cut"),
    ("answers whose end token is learned", "stop_token_trained_fraction"),
    ("empty answers", "answers_empty"),
    ("tokens", "tokens_total"),
    ("tokens learned", "tokens_trained"),
    ("tokens masked", "tokens_masked"),
    ("mean length before cutting", "length_mean"),
    ("median length", "length_p50"),
    ("95 % of the rows have at most", "length_p95"),
    ("99 % of the rows have at most", "length_p99"),
    ("longest row", "length_max"),
)
_PAIRS = (
    ("pairs", "pairs"),
    ("mean length of chosen answers", "chosen_tokens_mean"),
    ("mean length of rejected answers", "rejected_tokens_mean"),
    ("pairs whose chosen answer is the longer", "chosen_longer_fraction"),
    ("pairs of equal answers", "pairs_equal"),
    ("pairs cut on one side only", "pairs_cut_on_one_side"),
    ("pairs cut on both sides", "pairs_cut_on_both_sides"),
    ("pairs dropped because nothing is left of an answer", "pairs_lost"),
    ("tokens of prompts, computed once for two answers", "tokens_shared"),
)
_RATED = (("good answers", "good_answers"), ("bad answers", "bad_answers"))

_MOST_CHARACTERS = 10  # that are shown
_KINDS = {"answer": "answers", "call": "tool calls", "end": "ends of turns", "text": "other text"}


def ledger_lines(ledger: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of label and count; counts that an older record lacks are omitted."""
    lines = [(label, _show(name, ledger[name])) for label, name in _LINES if name in ledger]
    counts = ledger.get("preferences")
    lines += _preferences(counts) if isinstance(counts, Mapping) else []
    kinds = ledger.get("tokens_by_kind", {})
    lines += [(f"tokens learned: {_KINDS.get(kind, kind)}", format_count(n)) for kind, n in kinds.items()]
    for name, part in ledger.get("sets", {}).items():
        trained = f"{format_count(part['tokens_trained'])} tokens learned"
        lines.append((name, f"{_rows(part['rows_used'])} to train, {trained}"))
    lines += [(f"not used: {name}", _rows(count)) for name, count in ledger.get("not_used", {}).items()]
    lines += [(note, _rows(count)) for note, count in ledger.get("notes", {}).items()]
    lines += [(f"characters without a token: {character!r}", _rows(n)) for character, n in _first_lost(ledger)]
    if ledger.get("characters_lost"):
        lines.append(("characters of answers", format_count(ledger["answer_characters"])))
        lines.append(("characters of answers that are lost", format_count(ledger["answer_characters_lost"])))
    lines += [("file not read", name) for name in ledger.get("files_not_read", ())]
    if ledger.get("rows_skipped"):
        lines.append(("rows skipped", format_count(ledger["rows_skipped"])))
        lines += [("skipped", fault) for fault in ledger["skipped"]]
    return lines


def _preferences(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = _PAIRS if counts.get("pairs") else _RATED
    return [(label, _show(name, counts[name])) for label, name in names if name in counts]


def _first_lost(ledger: Mapping[str, Any]) -> list[tuple[str, int]]:
    return list(ledger.get("characters_lost", {}).items())[:_MOST_CHARACTERS]


def _rows(count: int) -> str:
    return f"{format_count(count)} row" if count == 1 else f"{format_count(count)} rows"


def _show(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("_fraction"):
        return format_share(value)
    is_length = name.startswith("length_") or name.endswith("_tokens_mean")
    return f"{format_count(value)} tokens" if is_length else format_count(value)
