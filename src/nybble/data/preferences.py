"""Rows of answers that were compared or rated: two answers to one prompt, or one answer and whether it is good.

Two answers stand in the columns `chosen` and `rejected`, as text, as a message, or as messages. Their prompt is what
the conversations begin with alike, or stands beside them:

    prompt (text) + chosen + rejected (text)      text as it is, as TRL has it
    prompt (messages) + chosen + rejected         turns, for the chat template
    chosen + rejected (whole conversations)       the prompt is the turns that both begin with
    question, instruction (+ input) + ..          a question for the chat template, as LLaMA-Factory's ranked sets
    messages, conversations + ..                  the turns before the answers

A rated answer is a row of any supervised shape with a label. Under kto a pair counts as two rated answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nybble.data.chats import read_turns
from nybble.data.columns import (
    QUESTIONS,
    Converted,
    Layout,
    RowReader,
    find_chat,
    find_column,
    find_layout,
    names_of,
    only_last_learned,
)
from nybble.data.files import Row
from nybble.data.rows import Rows
from nybble.data.shapes import Form, Piece, Turn
from nybble.errors import RowsError
from nybble.recipe import DataSection

_CHOSEN = ("chosen", "chosen_response", "preferred", "accepted")
_REJECTED = ("rejected", "rejected_response", "dispreferred")
_LABELS = ("label", "kto_tag")
_NEEDS_PAIR = (
    "chosen + rejected (whole conversations), or these beside prompt, question, instruction or messages; name others "
    "with --columns, e.g. --columns question=ask,chosen=better,rejected=worse"
)
_NEEDS_LABEL = (
    "prompt + completion + label, messages + label, or chosen + rejected; name others with --columns, e.g. --columns "
    "prompt=ask,completion=reply,label=good"
)


def layout_of(rows: Rows, data: DataSection, objective: str) -> Layout:
    """The layout of the rows under `objective`; under sft, pairs are rows only if `data_format` says so.

    Raises:
        RowsError: the columns of the first row do not fit.
    """
    if objective != "sft" or data.data_format == "preference":
        return _preference_layout(rows, data, objective)
    if data.data_format == "unpaired_preference":  # a label of false means that nothing of the row is learned
        data = data.model_copy(update={"data_format": "auto"})
    return find_layout(rows, data)


def _preference_layout(rows: Rows, data: DataSection, objective: str) -> Layout:
    first = rows.first
    where = f"{rows.source} row 1"
    given = dict(pair.split("=", 1) for pair in data.columns)
    missing = [column for column in given.values() if column not in first]
    if missing:
        raise RowsError(f"{where}: has no column {missing[0]!r}, which --columns names; it has {names_of(first)}")
    chosen = given.get("chosen") or next((name for name in _CHOSEN if name in first), None)
    rejected = given.get("rejected") or next((name for name in _REJECTED if name in first), None)
    if objective == "kto" and data.data_format != "preference" and not (chosen and rejected):
        return _rated_layout(rows, data, given, where)
    if data.data_format not in ("auto", "preference") or not (chosen and rejected):
        wanted = (
            "answers that are rated or compared" if objective == "kto" else "two answers, of which one is preferred"
        )
        has = f"has the columns {names_of(first)}"
        if chosen or rejected:
            has = f"has {chosen or rejected!r}, but no column for the other answer"
        elif data.data_format not in ("auto", "preference"):
            has = f"is of data_format {data.data_format}"
        said_by = f"objective {objective}" if objective != "sft" else "data_format preference"
        needed = _NEEDS_LABEL if objective == "kto" else _NEEDS_PAIR
        raise RowsError(f"{where}: {has}, and {said_by} needs {wanted}: {needed}")
    columns = {"chosen": chosen, "rejected": rejected}
    ignored = frozenset(data.ignore_columns)
    free = {name: value for name, value in first.items() if name not in ignored and name not in given.values()}
    prompt = _prompt_role(given, free, columns.values())
    return Layout("preference", {**prompt, **columns}, given, ignored)


def _prompt_role(given: Mapping[str, str], free: Mapping[str, Any], taken: Any) -> dict[str, str]:
    """The role and the column of what stands before the answers; nothing if they are whole conversations."""
    for role in ("prompt", "question", "messages"):
        if role in given:
            return {role: given[role]}
    others = {name: value for name, value in free.items() if name not in taken}
    if "prompt" in others:
        return {"prompt": "prompt"}
    chat = find_chat(others)
    if chat:
        return {"messages": chat}
    asked = find_column(QUESTIONS, others)
    return {"question": asked} if asked else {}


def _rated_layout(rows: Rows, data: DataSection, given: Mapping[str, str], where: str) -> Layout:
    label = given.get("label") or next((name for name in _LABELS if name in rows.first), None)
    if label is None:
        raise RowsError(
            f"{where}: has the columns {names_of(rows.first)}, and objective kto needs answers that are rated or "
            f"compared: {_NEEDS_LABEL}"
        )
    others = tuple(pair for pair in data.columns if not pair.startswith("label="))
    plain = "auto" if data.data_format == "unpaired_preference" else data.data_format
    section = data.model_copy(update={"columns": others, "data_format": plain})
    without = {name: value for name, value in rows.first.items() if name != label}
    layout = find_layout(replace(rows, first=without), section)
    if layout.shape == "text":
        raise RowsError(f"{where}: text without a prompt is not rated; objective kto needs {_NEEDS_LABEL}")
    return replace(layout, label=label)


def convert_preference(row: Row, layout: Layout, where: str, has_template: bool, answer_field: str = "") -> Converted:
    """A row of two answers as two forms that begin alike; of each, what follows the prompt is learned.

    Raises:
        RowsError: an answer is missing or of the wrong type, the prompts differ, or the row holds words that would not
            be used.
    """
    reader = RowReader(row, layout, where)
    for role in ("chosen", "rejected"):
        value = row.get(layout.columns[role])
        if value is None or value == [] or value == {}:
            other = "rejected" if role == "chosen" else "chosen"
            raise RowsError(
                f"{where}: column {layout.columns[role]!r} holds no answer, beside that of "
                f"{layout.columns[other]!r}; repair the row, or skip such rows with --on_bad_row skip"
            )
    forms = _forms(reader, has_template)
    return Converted(
        forms[0], not_used=reader.not_used(answer_field), notes=tuple(dict.fromkeys(reader.notes)), rejected=forms[1]
    )


def _forms(reader: RowReader, has_template: bool) -> tuple[Form, Form]:
    roles = tuple(reader.layout.columns)
    values = [reader.row[reader.layout.columns[role]] for role in ("chosen", "rejected")]
    for role, value in zip(("chosen", "rejected"), values, strict=True):
        if not isinstance(value, str | list | Mapping):
            raise RowsError(
                f"{reader.where}: column {reader.layout.columns[role]!r} is of type {type(value).__name__}, neither "
                "text nor messages; repair the row"
            )
    are_text = [isinstance(value, str) and not value.lstrip().startswith("[{") for value in values]
    if are_text[0] != are_text[1]:
        raise RowsError(f"{reader.where}: one of its answers is text and the other messages; repair the row")
    if are_text[0]:
        return _with_text_answers(reader, roles, has_template)
    answers = [_messages(reader, role) for role in ("chosen", "rejected")]
    prompt = _prompt_turns(reader, roles, answers)
    if prompt and not all(answer[: len(prompt)] == prompt for answer in answers):
        chosen, rejected = ([*prompt, *answer] for answer in answers)
        n_prompt = len(prompt)
    else:  # whole conversations, whatever repeats their beginning
        chosen, rejected = answers
        n_prompt = len(prompt) or _n_common(chosen, rejected)
    for turns in (chosen, rejected):
        if n_prompt == 0 or n_prompt == len(turns) or turns[n_prompt].role != "assistant":
            what = "begins with no common turn" if n_prompt == 0 else f"differs in turn {n_prompt + 1}, no answer"
            raise RowsError(
                f"{reader.where}: what stands before its two answers {what}; both must answer one prompt; repair the "
                "row, or skip such rows with --on_bad_row skip"
            )
    return _learned_from(reader, chosen, n_prompt), _learned_from(reader, rejected, n_prompt)


def _with_text_answers(reader: RowReader, roles: Sequence[str], has_template: bool) -> tuple[Form, Form]:
    chosen = reader.text("chosen")
    rejected = reader.text("rejected")
    if "prompt" in roles and isinstance(reader.row.get(reader.layout.columns["prompt"]), str):
        prompt = reader.text("prompt")
        if not prompt:
            raise RowsError(f"{reader.where}: its prompt is empty; both answers must follow one; repair the row")
        return [Piece(prompt + chosen, len(prompt))], [Piece(prompt + rejected, len(prompt))]
    if "question" in roles:
        question = reader.text("question")
        both = [reader.answered(question, Turn("assistant", answer), has_template) for answer in (chosen, rejected)]
        return only_last_learned(both[0]), only_last_learned(both[1])
    prompt_turns = _prompt_turns(reader, roles, [])
    if not prompt_turns:
        n_common = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        raise RowsError(
            f"{reader.where}: its two answers are text that begins alike for {n_common:,} characters, and no column "
            f"says where the prompt ends; add a column prompt, or name it: {_NEEDS_PAIR}"
        )
    n_prompt = len(prompt_turns)
    return (
        _learned_from(reader, [*prompt_turns, Turn("assistant", chosen)], n_prompt),
        _learned_from(reader, [*prompt_turns, Turn("assistant", rejected)], n_prompt),
    )


def _messages(reader: RowReader, role: str) -> list[Turn]:
    """The turns of a column that holds messages, or one."""
    column = reader.layout.columns[role]
    if isinstance(reader.row[column], Mapping):
        reader.used.add(column)
        return read_turns([reader.row[column]], f"{reader.where} column {column!r}")
    return read_turns(reader.listed(role), f"{reader.where} column {column!r}")


def _prompt_turns(reader: RowReader, roles: Sequence[str], answers: Sequence[list[Turn]]) -> list[Turn]:
    """The turns of the column before the answers; none if there is no such column, or if its text is what a turn says
    that both answers begin with."""
    role = next((role for role in ("prompt", "question", "messages") if role in roles), "")
    if not role:
        return []
    column = reader.layout.columns[role]
    said = reader.row.get(column)
    if not isinstance(said, str) or said.lstrip().startswith("["):
        return _messages(reader, role)
    said = reader.text(role)
    if all(answer[0].role == "assistant" for answer in answers):
        return [Turn("user", said)]
    common = answers[0][: _n_common(*answers)]
    if not any(turn.content.strip() == said.strip() for turn in common):
        raise RowsError(
            f"{reader.where}: column {column!r} says what no turn before its two answers says; leave it out with "
            f"--ignore_columns {column}, or repair the row"
        )
    return []


def _n_common(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    """The number of turns that two conversations begin with alike; of equal ones, all but the last."""
    shortest = min(len(chosen), len(rejected))
    n = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    return n if n < shortest else max(shortest - 1, 0)


def _learned_from(reader: RowReader, turns: Sequence[Turn], n_prompt: int) -> Form:
    prompt = [replace(turn, learn=False) for turn in turns[:n_prompt]]
    return reader.with_beside([*prompt, *turns[n_prompt:]])
