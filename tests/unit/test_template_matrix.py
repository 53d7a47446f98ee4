"""Every chat template that TRL ships, and four more, with every kind of conversation.

For each answer of each conversation: the context has the ids that `apply_chat_template` gives for the turns before it
with the generation prompt, and what is learned is what the template writes behind it, up to the token that ends the
turn. What a template cannot express is refused; docs/evidence/chat-templates.md lists what is refused and why, and is
written by running this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from nybble.data.chats import read_turns
from nybble.data.contexts import encode_turns
from nybble.data.shapes import Turn
from nybble.errors import RowsError

OWN = Path(__file__).parent / "chat_templates"
PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "chat-templates.md"
# What looks like a control token of some family in the text of a template.
CONTROL = re.compile(
    r"<\|[^|<>\n'\"{} ]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|\[gMASK\]|<sop>|\[/?[A-Z_]{4,}\]"
    r"|<\|?(?:turn|channel|tool|tool_call|tool_response)\|?>"
)
HEAD = """# Chat templates and what each can express

Each chat template that TRL {version} ships ({n_trl} of them) and four in the form of Llama 2, Mistral v0.3, Zephyr and
DeepSeek R1, with ten kinds of conversations. A number is how many contexts the conversation has: 1 if it is one
sequence, 2 if the template writes earlier turns in another way than it wrote them as newest ones. A letter is a
refusal, which ends with exit code 2 and one line. Everywhere else the ids of each context are those of
`apply_chat_template(.., add_generation_prompt=True)`, and what is learned is what the template writes behind them, up
to the token that ends the turn (`tests/unit/test_template_matrix.py`, which also writes this page).

"""


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def say(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, x: int) -> dict[str, Any]:
    return {"type": "function", "id": f"call0000{x}", "function": {"name": name, "arguments": {"x": x}}}


INTEGER = {"type": "object", "properties": {"x": {"type": "integer", "description": "how far"}}, "required": ["x"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Lets it {name}.", "parameters": INTEGER}}
    for name in ("move", "turn")
]
SUM, TWICE, GO = ask("What is 4 + 5?"), ask("And twice that?"), ask("Go to 7.")
RESULT = {"role": "tool", "name": "move", "tool_call_id": "call00007", "content": "arrived"}
CELLS: dict[str, list[dict[str, Any]]] = {
    "plain": [SUM, say("It is 9.")],
    "system": [{"role": "system", "content": "Be brief."}, SUM, say("It is 9.")],
    "multi-turn": [SUM, say("It is 9."), TWICE, say("It is 18.")],
    "reasoning inline": [
        SUM, say("<think>\nfour and five\n</think>\n\nIt is 9."),
        TWICE, say("<think>\ntwo nines\n</think>\n\nIt is 18."),
    ],
    "reasoning field": [
        SUM, say("It is 9.", reasoning_content="four and five"), TWICE, say("It is 18.", reasoning_content="two nines")
    ],
    "tools": [GO, say("I go there.", tool_calls=[call("move", 7)])],
    "call without words": [GO, say(None, tool_calls=[call("move", 7)])],
    "two calls": [GO, say(None, tool_calls=[call("move", 7), call("turn", 8)])],
    "results": [GO, say(None, tool_calls=[call("move", 7)]), RESULT, say("I am there.")],
    "empty answer": [ask("Say nothing."), say("")],
}  # fmt: skip
HAS_TOOLS = ("tools", "call without words", "two calls", "results")


@cache
def templates() -> dict[str, str]:
    trl = pytest.importorskip("trl")
    files = [*sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")), *sorted(OWN.glob("*.jinja"))]
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def tokenizer_for(template: str, make: Callable[[], Any]) -> Any:
    """A byte-level tokenizer with the template and the control tokens that it spells."""
    tokenizer = make()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # templates write the begin token themselves
    tokenizer.add_special_tokens({"extra_special_tokens": sorted({*CONTROL.findall(template)})})
    tokenizer.chat_template = template
    return tokenizer


def spellings(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same conversation in all the ways in which users of `apply_chat_template` write it for some template."""
    for as_text, as_parts, key, is_folded, is_user in product(
        (False, True), (False, True), ("", "inline", "thinking", "reasoning_content", "reasoning"), (False, True),
        (False, True)
    ):  # fmt: skip
        turns = json.loads(json.dumps(messages))
        for turn in turns:
            for made in turn.get("tool_calls", ()):
                if as_text:
                    made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
            turn["content"] = turn["content"] or ""
            why = turn.pop("reasoning_content", "")
            tagged = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", turn["content"])
            if tagged and key not in ("", "inline"):
                why, turn["content"] = tagged.groups()
            if why and key in ("", "inline"):
                turn["content"] = f"<think>\n{why}\n</think>\n\n{turn['content']}"
            elif why:
                turn[key] = why
            if is_user and turn["role"] == "tool":
                turn["role"] = "user"
        if is_folded and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
            turns[0]["content"] = f"{system}\n\n{turns[0]['content']}"
        for turn in turns:
            if as_parts:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        yield turns


def rendered(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, asks: bool) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks))
    except Exception:  # noqa: BLE001 - a template may fail on a spelling in any way
        return None


def check(tokenizer: Any, cell: str) -> str | int:
    """The number of contexts, each of which is right; or why the conversation is refused."""
    messages = CELLS[cell]
    tools = TOOLS if cell in HAS_TOOLS else None
    head = [Turn("tools", json.dumps(tools))] if tools else []
    try:
        contexts, _notes = encode_turns([*head, *read_turns(messages, "row 1")], tokenizer, where="row 1")
    except RowsError as error:
        return str(error)
    found = [(context.ids, answer) for context in contexts for answer in context.answers]
    places = [k for k, turn in enumerate(messages) if turn["role"] == "assistant"]
    assert len(found) == len(places)
    for k, (ids, answer) in zip(places, found, strict=True):
        learned = [token for first, end, _kind in answer.spans for token in ids[first:end]]
        assert learned == ids[answer.first : answer.end]
        assert tokenizer.convert_ids_to_tokens(learned[-1]) in tokenizer.all_special_tokens
        assert is_as_generated(tokenizer, (messages, tools, k), (ids[: answer.first], learned))
    return len(contexts)


def is_as_generated(tokenizer: Any, question: tuple[Any, Any, int], found: tuple[list[int], list[int]]) -> bool:
    """Whether some spelling of the conversation has this context, and this behind it."""
    messages, tools, k = question
    context, learned = found
    if tools and "tools" not in tokenizer.chat_template:  # they are part of the system text
        system = f"These functions may be called, as a JSON object with name and arguments:\n{json.dumps(tools)}"
        messages = [{"role": "system", "content": system}, *messages]
        tools = None
        k += 1
    text = tokenizer.decode(learned)
    for turns, newest in zip(spellings(messages[:k]) if k else [], spellings(messages[: k + 1]), strict=True):
        asked = rendered(tokenizer, turns, tools, asks=True)
        if asked is None or tokenizer(asked, add_special_tokens=False).input_ids != context:
            continue
        whole = rendered(tokenizer, newest, tools, asks=False)
        if whole is None:
            continue
        if whole.startswith(asked) and is_up_to_its_end(whole[len(asked) :], text, tokenizer):
            return True
        if is_the_same_without_thoughts(whole, asked + text, messages[k]):
            return True
    return False


def is_up_to_its_end(completion: str, text: str, tokenizer: Any) -> bool:
    """Whether only white space and control tokens follow the text in the completion, or an end token is added."""
    rest = completion[len(text) :]
    for token in tokenizer.all_special_tokens:
        rest = rest.replace(token, "")
    return (completion.startswith(text) and not rest.strip()) or text == completion + tokenizer.eos_token


def is_the_same_without_thoughts(whole: str, built: str, message: dict[str, Any]) -> bool:
    """Whether the texts differ only in a reasoning block, which the prompt opens and the template does not write."""
    words = re.sub(r"(?s).*</think>", "", message["content"] or "").strip()
    why = message.get("reasoning_content") or "".join(re.findall(r"(?s)<think>(.*)</think>", message["content"] or ""))
    block = re.search(r"(?s)<think>((?:(?!<think>).)*)</think>\s*((?:(?!</think>).)*)\Z", built)
    if block is None or block[1].strip() != why.strip() or not block[2].startswith(words):
        return False
    shortened = built[: block.start()] + block[2]
    kept = re.sub(r"(?s)<think>\s*</think>\s*((?:(?!</think>).)*)\Z", r"\1", whole)
    return "".join(shortened.split()) == "".join(kept.split())


@pytest.mark.parametrize("name", templates())
def test_each_answer_is_learned_as_generated_or_refused(name: str, byte_tokenizer: Callable[[], Any]) -> None:
    tokenizer = tokenizer_for(templates()[name], byte_tokenizer)
    results = {cell: check(tokenizer, cell) for cell in CELLS}
    assert row_of(name, results) in PAGE.read_text(encoding="utf-8").splitlines()
    for cell in ("plain", "system", "multi-turn", "empty answer"):
        assert isinstance(results[cell], int)
    for refusal in (result for result in results.values() if isinstance(result, str)):
        assert re.fullmatch(r"row 1: [^\n]+; [^\n]+", refusal)  # one line: what was seen, and what to do


def test_the_page_lists_these_templates(byte_tokenizer: Callable[[], Any]) -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [*templates()]


REASONS = {
    "a": ("leaves out the reasoning", "the template does not write the reasoning, which stands in a field of its own"),
    "b": ("ends the reasoning before", "the generation prompt closes the reasoning block, so none can follow"),
    "c": ("does not support tool_calls", "the template knows no tool calls"),
    "d": ("leaves out the words", "the template drops the words of an answer that also calls a tool"),
    "e": ("leaves out the call", "the template drops a call"),
    "f": ("only supports single tool-calls", "the template allows one call in a turn"),
}


def row_of(name: str, results: dict[str, str | int]) -> str:
    """The line of the page for one template."""
    shown = []
    for result in results.values():
        letters = [letter for letter, (words, _why) in REASONS.items() if words in str(result)]
        shown.append(str(result) if isinstance(result, int) else "".join(letters) or f"? {result}")
    return f"| `{name}` | {' | '.join(shown)} |"


def write_page(make: Callable[[], Any]) -> None:
    """Write the page of what each template can express."""
    import trl

    n_own = len(list(OWN.glob("*.jinja")))
    lines = [HEAD.format(version=trl.__version__, n_trl=len(templates()) - n_own)]
    lines += [f"- **{letter}**: {why}\n" for letter, (_words, why) in REASONS.items()]
    lines += ["\n| template | ", " | ".join(CELLS), " |\n|---", "|---" * len(CELLS), "|\n"]
    for name, template in templates().items():
        tokenizer = tokenizer_for(template, make)
        lines.append(row_of(name, {cell: check(tokenizer, cell) for cell in CELLS}) + "\n")
    PAGE.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    from conftest import _make

    write_page(_make)
