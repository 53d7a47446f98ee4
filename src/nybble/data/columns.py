"""Find out what the columns of the rows are, and convert each row to one of two forms.

    pieces    text in which the answers are already marked: [INST] text, prompt + completion, plain text
    turns     a conversation, which a chat template will render: messages, or a question and its answer

The columns of the first row determine the shape; a later row with other columns is an error that names its number.
Whatever a row holds beside its shape is used, or refused, or named as not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nybble.data.chats import (
    FLAG_KEYS,
    REASONING_KEYS,
    as_function,
    in_order,
    is_blank,
    parse_json,
    read_flag,
    read_turns,
    unused_keys,
)
from nybble.data.files import Row
from nybble.data.rendered import looks_like_turns
from nybble.data.rows import Rows
from nybble.data.shapes import Form, Piece, Turn, alpaca_prompt, check_size, prompt_form_of, split_text
from nybble.errors import RowsError
from nybble.guard import clipped, shown
from nybble.recipe import DataSection

_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
# The usual names of a question and of its answer, the first that a row has is taken. `answer` comes late, because
# beside a solution it holds only the result.
QUESTIONS = ("question", "instruction", "prompt", "query", "problem", "input", "user", "human")
_ANSWERS = ("completion", "output", "response", "solution", "answer", "assistant", "target")
# Role -> the usual names of its column; these columns may be absent from any row.
_BESIDE = {
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions", "tool_defs"),
    "reasoning": REASONING_KEYS,
    "input": ("input", "context"),
}
_ADVICE_ON_PAIRS = "; --objective dpo learns which of them is preferred"
_RANKED = ("chosen", "rejected", "completions", "responses", "scores", "ranks")
_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
# Columns and keys that usually carry words: a row is refused if one of them would not be used.
_CARRIERS = {name for role in ("system", "history", "tools", "reasoning") for name in _BESIDE[role]} | _MEDIA


@dataclass(frozen=True)
class Layout:
    """What the columns of a data set are."""

    shape: str  # a value of the setting `data_format` other than auto
    columns: Mapping[str, str]  # role -> column, of the roles that every row must have
    given: Mapping[str, str] = field(default_factory=dict)  # role -> column, as the setting `columns` says
    ignored: frozenset[str] = frozenset()  # columns that the setting `ignore_columns` names
    label: str = ""  # column that says whether the answer is good, of rows of rated answers


@dataclass(frozen=True)
class Converted:
    """A row in the form in which it is encoded."""

    form: Form
    is_learned: bool = True  # False if a column says that nothing of the row is learned
    not_used: tuple[str, ...] = ()  # columns, and message keys as `messages.key`, that hold something and are not used
    notes: tuple[str, ...] = ()  # what was changed in the row, for the ledger
    rejected: Form = ()  # of a row of two answers: the conversation or text with the answer that is not preferred
    is_desirable: bool | None = None  # of a row of a rated answer


def find_layout(rows: Rows, data: DataSection) -> Layout:
    """The layout of the rows according to the settings and the columns of the first row.

    Raises:
        RowsError: the columns belong to no supported shape.
    """
    first = rows.first
    given = dict(pair.split("=", 1) for pair in data.columns)
    where = f"{rows.source} row 1"
    missing = [column for column in given.values() if column not in first]
    if missing:
        raise RowsError(f"{where}: has no column {missing[0]!r}, which --columns names; it has {names_of(first)}")
    ignored = frozenset(data.ignore_columns)
    free = {
        name: value
        for name, value in first.items()
        if name not in ignored and name not in given.values() and name not in given
    }
    present = {role: first[column] for role, column in given.items()} | free
    shape = data.data_format if data.data_format != "auto" else _find_shape(present, given, data)
    if shape is None:
        ranked = [name for name in _RANKED if name in first]
        if ranked:
            raise RowsError(
                f"{where}: the columns {', '.join(ranked)} hold several answers, ranked or scored, and one is learned; "
                f"{_advice_on_ranked(first)}{_ADVICE_ON_PAIRS if {'chosen', 'rejected'} <= first.keys() else ''}"
            )
        raise RowsError(
            f"{where}: has the columns {names_of(first)}; allowed: {data.dataset_text_field} (--dataset_text_field), "
            "prompt + completion, instruction + output, messages, or conversations, question + answer; name others "
            "with --columns, e.g. --columns question=ask,answer=reply"
        )
    columns = {role: given.get(role, role) for role in _roles_of(shape, present, data)}
    if shape == "qa":
        question = "question" if "question" in given else find_column(QUESTIONS, present) or "question"
        answer = "answer" if "answer" in given else find_column(_ANSWERS, present) or "answer"
        columns = {"question": given.get(question, question), "answer": given.get(answer, answer)}
    return Layout(shape, columns, given, ignored)


def _advice_on_ranked(first: Row) -> str:
    if isinstance(first.get("chosen"), list):
        return "name it, e.g. --columns messages=chosen"
    if isinstance(first.get("chosen"), str):
        asked = first_text(QUESTIONS, first)
        return "name it, e.g. " + (
            f"--columns question={asked},answer=chosen" if asked else "--dataset_text_field chosen"
        )
    return "write rows with one answer each"


def _roles_of(shape: str, present: Mapping[str, Any], data: DataSection) -> tuple[str, ...]:
    if shape in ("messages", "sharegpt"):
        return (find_chat(present) or ("messages" if shape == "messages" else "conversations"),)
    roles = {"text": (data.dataset_text_field,), "prompt_completion": ("prompt", "completion")}
    return roles.get(shape, ("instruction", "output"))


def _find_shape(present: Mapping[str, Any], given: Mapping[str, str], data: DataSection) -> str | None:
    """The shape, or None. What the setting `columns` names comes first; then a shape that has its usual names."""
    chat = find_chat(present)
    usual: list[tuple[str, bool]] = [
        ("qa", bool({"question", "answer"} & given.keys())),
        ("sharegpt", chat is not None and "from" in (_first_message(present[chat]) or ())),
        ("messages", chat is not None),
        ("prompt_completion", "prompt" in present and "completion" in present),
        ("alpaca", "instruction" in present and "output" in present),
        ("text", data.dataset_text_field in present),
        ("qa", bool(first_text(QUESTIONS, present) and first_text(_ANSWERS, present))),
        # These hold no conversation or no text in the first row, which is then named as a fault.
        ("messages", "messages" in present),
        ("sharegpt", "conversations" in present),
        ("qa", bool(find_column(QUESTIONS, present) and find_column(_ANSWERS, present))),
    ]
    return next((shape for shape, is_there in usual if is_there), None)


def find_chat(present: Mapping[str, Any]) -> str | None:
    """The first of the usual columns that holds messages, as a list or as the JSON text of one."""
    return next((name for name in _CHATS if _first_message(present.get(name)) is not None), None)


def _first_message(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # this is found again, and named, where the row is converted
            return None
    first = value[0] if isinstance(value, list) and value else None
    return first if isinstance(first, Mapping) else None


def first_text(names: tuple[str, ...], present: Mapping[str, Any]) -> str | None:
    return next((name for name in names if isinstance(present.get(name), str)), None)


def find_column(names: tuple[str, ...], present: Mapping[str, Any]) -> str | None:
    """The first of the names whose column holds text; if none does, the first that is a column of single values."""
    single = (name for name in names if name in present and not isinstance(present[name], list | Mapping))
    return first_text(names, present) or next(single, None)


def convert_row(row: Row, layout: Layout, where: str, has_template: bool, answer_field: str = "") -> Converted:
    """The row as pieces or turns.

    Args:
        row: the row.
        layout: of its data set.
        where: the row's place, with which the message of an error starts.
        has_template: whether turns can be rendered; without a chat template, questions are put in Alpaca's form.
        answer_field: a column that holds the exact answer, which counts as used.

    Raises:
        RowsError: a column is missing, has the wrong type, or holds words that would not be used.
    """
    reader = RowReader(row, layout, where)
    is_desirable = reader.rating() if layout.label else None
    is_learned = True if layout.label else reader.is_learned()
    form = _form_of(reader, has_template)
    if layout.label and layout.shape in ("messages", "sharegpt"):
        form = only_last_learned(form)
    return Converted(form, is_learned, reader.not_used(answer_field), tuple(reader.notes), is_desirable=is_desirable)


def only_last_learned(form: Form) -> Form:
    """The form, of which only the last answer is learned: those before it are what it answers."""
    last = max((i for i, part in enumerate(form) if isinstance(part, Turn) and part.role == "assistant"), default=0)
    return [replace(part, learn=False) if isinstance(part, Turn) and i < last else part for i, part in enumerate(form)]


def _form_of(reader: RowReader, has_template: bool) -> Form:
    """The row as pieces or turns, according to its shape."""
    layout = reader.layout
    form: Form
    if layout.shape in ("messages", "sharegpt"):
        (role,) = layout.columns
        form = reader.conversation(reader.listed(role), role)
    elif layout.shape == "prompt_completion" and isinstance(reader.row.get(layout.columns["prompt"]), list):
        completion = reader.completion()
        asked = [replace(turn, learn=False) for turn in read_turns(reader.listed("prompt"), reader.where)]
        form = reader.with_beside([*asked, *completion])
    elif layout.shape == "prompt_completion":
        prompt = reader.text("prompt")
        if layout.label and not prompt:
            raise RowsError(f"{reader.where}: its prompt is empty; an answer must follow one; repair the row")
        form = [Piece(prompt + reader.text("completion"), len(prompt))]
    elif layout.shape == "text":
        (role,) = layout.columns
        text = reader.text(role)
        form = split_text(text)
        if not prompt_form_of(form) and looks_like_turns(text):
            reader.notes.append("text that looks like turns has no known marks, so all of it is learned")
    else:
        form = reader.exchange(has_template)
    return form


class RowReader:
    """Reads the columns of one row and remembers which of them were used."""

    def __init__(self, row: Row, layout: Layout, where: str) -> None:
        self.row = row
        self.layout = layout
        self.where = where
        self.used: set[str] = set()
        self.unused_keys: list[str] = []
        self.notes: list[str] = []

    def text(self, role: str) -> str:
        """The text of a column that every row has."""
        column = self.layout.columns[role]
        value = self.value(column)
        if not isinstance(value, str):
            raise RowsError(
                f"{self.where}: column {column!r} is of type {type(value).__name__}, not text; repair the row"
            )
        check_size(len(value), self.where)
        return value

    def listed(self, role: str) -> list[Any]:
        """The messages of a column, which holds a list or the JSON text of one."""
        column = self.layout.columns[role]
        value = self.value(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parse_json(value, f"{self.where}: column {column!r}")
        if not isinstance(value, list) or not value:
            raise RowsError(
                f"{self.where}: column {column!r} holds {shown(value)}, not a list of turns; repair the row"
            )
        self.unused_keys += sorted(f"{column}.{key}" for key in unused_keys([m for m in value if isinstance(m, dict)]))
        return value

    def completion(self) -> list[Turn]:
        """What follows a prompt that is a list of turns: turns, or the text of an answer."""
        value = self.row.get(self.layout.columns["completion"])
        if isinstance(value, str) and self.row[self.layout.columns["prompt"]]:
            return [Turn("assistant", self.text("completion"))]
        return read_turns(self.listed("completion"), self.where)

    def beside(self, role: str) -> tuple[str, Any]:
        """The column of a role that need not be there, and what it holds: ("", None) without one.

        Raises:
            RowsError: two columns of this role differ.
        """
        given = self.layout.given.get(role)
        names = (given,) if given else _BESIDE[role]
        found = [
            name
            for name in names
            if name not in self.layout.ignored
            and name not in self.layout.columns.values()
            and not is_blank(self.row.get(name))
        ]
        for name in found[1:]:
            if self.row[name] != self.row[found[0]]:
                raise RowsError(
                    f"{self.where}: the columns {found[0]} and {name} differ; leave one out, e.g. with "
                    f"--ignore_columns {name}"
                )
        self.used.update(found)
        return (found[0], self.row[found[0]]) if found else ("", None)

    def conversation(self, messages: list[Any], role: str) -> Form:
        turns = read_turns(messages, self.where)
        for column in self._flag_columns():
            flags = self.row[column]
            if isinstance(flags, list):
                self.used.add(column)
                if len(flags) != len(turns):
                    raise RowsError(
                        f"{self.where}: column {column!r} has {len(flags)} flags for {len(turns)} turns; give one each"
                    )
                marks = [read_flag(flag, f"{self.where}: column {column!r}", column) for flag in flags]
                turns = [replace(turn, learn=turn.learn and mark) for turn, mark in zip(turns, marks, strict=True)]
        return self.with_beside(turns)

    def exchange(self, has_template: bool) -> Form:
        """A question and its answer."""
        question, answer = (self.text(role) for role in self.layout.columns)
        reasoning = self._words_beside("reasoning") if has_template else ""
        return self.answered(question, Turn("assistant", answer, reasoning=reasoning), has_template)

    def answered(self, question: str, answer: Turn, has_template: bool) -> Form:
        """A question, with what stands beside it, and an answer to it."""
        extra = self._words_beside("input")
        if has_template:
            asked = f"{question}\n\n{extra}" if extra else question
            return self.with_beside([Turn("user", asked), answer])
        prompt = alpaca_prompt(question, extra)
        return [Piece(prompt + answer.content, len(prompt), is_literal=True, prompt_form="alpaca")]

    def with_beside(self, turns: list[Turn]) -> list[Turn]:
        """The turns behind those that the columns for tools, system text and history hold."""
        tools = self._tools()
        system = self._words_beside("system")
        if system and turns[0].role != "system":
            turns = [Turn("system", system), *turns]
        elif system and turns[0].content != system:
            raise RowsError(
                f"{self.where}: the column for the system text and the first turn differ; leave one of them out, the "
                "column with --ignore_columns"
            )
        former = self._history()
        if former and self.layout.label:
            former = [replace(turn, learn=False) for turn in former]
        if former:
            at = 1 if turns[0].role == "system" else 0
            turns = [*turns[:at], *former, *turns[at:]]
        turns, is_joined = in_order(turns, self.where)
        if is_joined:
            self.notes.append("turns of one role joined")
        return [*([Turn("tools", tools)] if tools else []), *turns]

    def _history(self) -> list[Turn]:
        column, history = self.beside("history")
        if not column:
            return []
        if isinstance(history, str):
            history = parse_json(history, f"{self.where}: column {column!r}")
        turns: list[Turn] = []
        for entry in history if isinstance(history, list) else [None]:
            if isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry):
                turns += [Turn("user", entry[0]), Turn("assistant", entry[1])]
            elif isinstance(entry, Mapping):
                turns += read_turns([entry], f"{self.where} column {column!r}")
            else:
                raise RowsError(
                    f"{self.where}: column {column!r} holds {shown(history)}, not a list of [question, answer]; repair "
                    "the row"
                )
        return turns

    def _tools(self) -> str:
        """The functions that may be called, as JSON text, or "" if there are none."""
        column, tools = self.beside("tools")
        if isinstance(tools, str) and tools.strip():
            tools = parse_json(tools, f"{self.where}: column {column!r}")
        if is_blank(tools):
            return ""
        if not isinstance(tools, list):
            raise RowsError(
                f"{self.where}: column {column!r} is of type {type(tools).__name__}, not a list of functions; "
                "repair the row"
            )
        tools = [
            parse_json(tool, f"{self.where}: column {column!r}") if isinstance(tool, str) and tool[:1] == "{" else tool
            for tool in tools
        ]
        # OpenAI's older column `functions` has the bare definitions; a bare one in `tools` is as its author meant it.
        wrapped = [
            as_function(tool, "parameters")
            if isinstance(tool, Mapping) and (column == "functions" or "function" in tool)
            else tool
            for tool in tools
        ]
        return json.dumps(wrapped, ensure_ascii=False)

    def is_learned(self) -> bool:
        """Whether the columns say that the row as a whole is learned: a `label`, or one flag for the row."""
        learned = True
        if self.layout.shape == "text":
            return learned
        if isinstance(self.row.get("label"), bool):
            self.used.add("label")
            learned = self.row["label"]
        for column in self._flag_columns():
            if isinstance(self.row[column], int | float):
                self.used.add(column)
                learned = read_flag(self.row[column], f"{self.where}: column {column!r}", column) and learned
        return learned

    def rating(self) -> bool:
        """Whether the answer of the row is good.

        Raises:
            RowsError: the label is neither true nor false.
        """
        column = self.layout.label
        value = self.value(column)
        said = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
        if said not in (True, False):  # 0 and 1 are equal to them
            raise RowsError(
                f"{self.where}: column {column!r} holds {shown(value)}; a label is true (a good answer) or false (a "
                "bad one); repair the row"
            )
        return bool(said)

    def _flag_columns(self) -> list[str]:
        return [name for name in FLAG_KEYS if name in self.row and name not in self.layout.ignored]

    def not_used(self, answer_field: str) -> tuple[str, ...]:
        """The columns and keys that hold something and were not used.

        Raises:
            RowsError: one of them usually carries words.
        """
        self.used.add(answer_field)
        unused = [name for name in self.row if name not in self.used and not is_blank(self.row[name])]
        unused += self.unused_keys
        for name in unused:
            key = name.rpartition(".")[2]
            is_given = name in self.layout.given.values()
            if (is_given or key in _CARRIERS) and name not in self.layout.ignored:
                raise RowsError(
                    f"{self.where}: {name!r} holds what {self.layout.shape} rows do not use; {self._advice(key)}, or "
                    f"leave it out with --ignore_columns {name}"
                )
        return tuple(map(clipped, unused))

    def _advice(self, key: str) -> str:
        if key in _MEDIA:
            return "only text is learned"
        if self.layout.shape == "prompt_completion":
            return "--columns question=prompt,answer=completion makes turns of the row, which take it"
        if self.layout.shape == "text":
            return "--columns question=..,answer=.. names the columns of a conversation, which takes it"
        if self.layout.shape in ("messages", "sharegpt"):
            return "write it into the messages"
        return "set --chat_template, which takes it"

    def value(self, column: str) -> Any:
        if column not in self.row:
            raise RowsError(
                f"{self.where}: column {column!r} is missing; the row has {names_of(self.row)}; repair the row"
            )
        self.used.add(column)
        return self.row[column]

    def _words_beside(self, role: str) -> str:
        """The text of a column that need not be there, or ""."""
        column, value = self.beside(role)
        if column and not isinstance(value, str):
            raise RowsError(
                f"{self.where}: column {column!r} is of type {type(value).__name__}, not text; repair the row, or "
                f"leave the column out with --ignore_columns {column}"
            )
        return value if column else ""


def names_of(row: Row) -> str:
    return clipped(", ".join(map(str, row))) or "none"
