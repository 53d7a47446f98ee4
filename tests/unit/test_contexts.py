"""Each answer is learned as generation meets it, whatever the template does with earlier turns, reasoning and calls.

The templates are written for these tests; texts are byte-level, so that contexts and learned texts can be written down.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from nybble.data import Prepared, encode_chat
from nybble.data.contexts import encode_turns
from nybble.data.shapes import Turn
from nybble.data.tree import merge_contexts, unfold
from nybble.errors import RowsError

Call = Callable[..., Prepared]
# Writes reasoning of the newest answer only, as most templates of reasoning models do.
THINKS = (
    "{%- set last = namespace(q=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.q = loop.index0 %}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
    "{% set why = m.reasoning_content or '' %}{% set text = m.content or '' %}"
    "{% if not why and '</think>' in text %}{% set why = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "{% if loop.index0 > last.q and (loop.last or why) %}{{ '<think>' + why + '</think>' }}{% endif %}{{ text }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + (c.function.arguments|tojson) + '</call>' }}"
    "{% endfor %}{{ eos_token }}{% else %}{{ m.content + '|' }}{% endif %}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}{# knows 'tool' and tools #}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '|') }}"
    "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
)
ASKED = "<s>user: 3 + 4?|assistant: "
LATER = "user: Twice?|assistant: "


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def say(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    return {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def contexts(
    prepare: Call, tok: Any, tmp_path: Path, contexts_of: Callable[..., list[tuple[str, str]]]
) -> Callable[..., list[tuple[str, str]]]:
    """`contexts(template, turns, **settings)` -> the text of each context, and what is learned in it."""

    def run(template: str, turns: Sequence[dict[str, Any]], tools: Any = None, **settings: Any) -> Any:
        (tmp_path / "t.jinja").write_text(template)
        row = {"messages": turns} | ({"tools": tools} if tools else {})
        done = prepare([row], chat_template=str(tmp_path / "t.jinja"), **settings)
        return [context for example in done.train for context in contexts_of(example, tok)]

    return run


Contexts = Callable[..., list[tuple[str, str]]]
FIELD = [ask("3 + 4?"), say("7", reasoning_content="add"), ask("Twice?"), say("14", reasoning_content="double")]
INLINE = [ask("3 + 4?"), say("<think>\nadd\n</think>\n\n7"), ask("Twice?"), say("<think>\ndouble\n</think>\n\n14")]


@pytest.mark.parametrize("turns", [FIELD, INLINE], ids=["field", "inline"])
def test_reasoning_is_learned_in_each_answer_and_gone_in_later_contexts(contexts: Contexts, turns: Any) -> None:
    first = f"{ASKED}<think>add</think>7</s>"
    second = f"{ASKED}7</s>{LATER}<think>double</think>14</s>"
    learned = ("<think>add</think>7</s>", "<think>double</think>14</s>")
    assert contexts(THINKS, turns) == list(zip((first, second), learned, strict=True))
    masked = contexts(THINKS, turns, reasoning="mask")
    assert masked == [(first, "7</s>"), (second, "14</s>")]
    dropped = contexts(THINKS, turns, reasoning="drop")
    assert [text for _, text in dropped] == ["<think></think>7</s>", "<think></think>14</s>"]
    assert contexts(THINKS, turns, loss_on="last_answer") == [(second, learned[1])]


@pytest.mark.parametrize(("thought", "words"), [("hi", "I"), ("t", "h"), ("think", "nk")])
def test_a_thought_that_stands_in_its_own_tag_too_is_masked_whole(contexts: Contexts, thought: str, words: str) -> None:
    turns = [ask("3 + 4?"), say(words, reasoning_content=thought)]
    assert contexts(THINKS, turns, reasoning="mask")[0][1] == f"{words}</s>"
    assert contexts(THINKS, turns)[0][1] == f"<think>{thought}</think>{words}</s>"


def test_the_ledger_counts_each_kind(prepare: Call, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(THINKS)
    turns = [ask("3 + 4?"), say("7", reasoning_content="add", tool_calls=[call("note", {"n": 1})])]
    settings = {"chat_template": str(tmp_path / "t.jinja")}
    done = prepare([{"messages": turns}, {"messages": [ask("a"), say("bc")]}], **settings)
    kinds = done.ledger.tokens_by_kind
    wanted = {"reasoning": "<think>add</think>" + "<think></think>", "answer": "7bc", "end": "ee"}
    wanted["call"] = '<call>note{"n": 1}</call>'
    assert {kind: n for kind, n in kinds.items() if kind in ("answer", "end")} == {"answer": 3, "end": 2}
    assert kinds.keys() == wanted.keys()
    assert sum(kinds.values()) == done.ledger.tokens_trained
    assert any(line.startswith("learned: ") and "tokens of call" in line for line in done.ledger.in_words)
    masked = prepare([{"messages": turns}], reasoning="mask", **settings).ledger.tokens_by_kind
    assert "reasoning" not in masked


@pytest.mark.parametrize(
    ("loss_on", "learned"),
    [
        ("answers", ['<think>add</think>I look.<call>find{"x": 2}</call></s>', "<think></think>Found.</s>"]),
        ("tool_calls", ['<call>find{"x": 2}</call></s>']),
        ("content", ["<think>add</think>I look.", "<think></think>Found.</s>"]),
    ],
)
def test_loss_on_chooses_between_calls_and_content(contexts: Contexts, loss_on: str, learned: list[str]) -> None:
    turns = [
        ask("3 + 4?"),
        say("I look.", reasoning_content="add", tool_calls=[call("find", {"x": 2})]),
        {"role": "tool", "content": "yes"},
        say("Found."),
    ]
    assert contexts(THINKS, turns, loss_on=loss_on)[0][1] == "".join(learned)


FORCED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ 'assistant: ' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ m.role + ': ' + m.content + '|' }}"
    "{% endif %}{% endfor %}{{ 'assistant: <think>\n' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    ("turn", "learned"),
    [
        (say("<think>\nadd\n</think>\n\n7"), "add\n</think>\n\n7</s>"),
        (say("add\n</think>\n\n7"), "add\n</think>\n\n7</s>"),
        (say("7", reasoning_content="add"), "add\n</think>\n\n7</s>"),
        (say("7"), "\n</think>\n\n7</s>"),
        (say("<b>7</b>"), "\n</think>\n\n<b>7</b></s>"),
    ],
)
def test_what_the_prompt_opens_is_context_and_the_rest_is_learned(contexts: Contexts, turn: Any, learned: str) -> None:
    asked = f"{ASKED}<think>\n"
    assert contexts(FORCED, [ask("3 + 4?"), turn]) == [(asked + learned, learned)]


def test_a_template_may_write_the_opening_another_way_than_it_prompts(contexts: Contexts) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'assistant: <think>' }}"
        "{{ (m.reasoning_content or '') + '</think>' + m.content + eos_token }}{% else %}"
        "{{ m.role + ': ' + m.content + '|' }}{% endif %}{% endfor %}"
        "{{ 'assistant: <think>\n' if add_generation_prompt }}"
    )
    learned = "add</think>7</s>"
    assert contexts(template, FIELD[:2]) == [(f"{ASKED}<think>\n{learned}", learned)]


CLOSED = PLAIN.replace("'assistant: ' if", "'assistant: <think></think>' if").replace(
    "m.content +",
    "('<think>' + (m.reasoning_content or '') + '</think>' if m.role == 'assistant' else '') + m.content +",
)


def test_reasoning_that_the_prompt_rules_out_is_refused(contexts: Contexts) -> None:
    assert contexts(CLOSED, FIELD[:2], reasoning="drop") == [(f"{ASKED}<think></think>7</s>", "7</s>")]
    with pytest.raises(RowsError, match=r"row 1: the generation prompt .* set --reasoning drop"):
        contexts(CLOSED, FIELD[:2])


def test_reasoning_that_the_template_never_writes_is_refused(contexts: Contexts) -> None:
    for turns in (FIELD, FIELD[:2]):
        with pytest.raises(RowsError, match="row 1: the chat template leaves out the reasoning 'add' of an"):
            contexts(PLAIN, turns)
    assert contexts(PLAIN, FIELD[:2], reasoning="drop") == [(f"{ASKED}7</s>", "7</s>")]
    inline = "<think>\nadd\n</think>\n\n7</s>"
    assert contexts(PLAIN, INLINE[:2]) == [(ASKED + inline, inline)]  # in the content, it is words like others


END_AT_THE_END = PLAIN.replace("{% endfor %}{{ 'assistant: ' if add_generation_prompt }}", "{% endfor %}").replace(
    "(eos_token if m.role == 'assistant' else '|')", "'<pad>\n'"
) + ("{{ 'assistant: ' if add_generation_prompt else eos_token }}")
TWO = [ask("3 + 4?"), say("7"), ask("Twice?"), say("14")]


def test_an_end_token_at_the_very_end_leaves_one_sequence(contexts: Contexts, tok: Any) -> None:
    tok.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    template = END_AT_THE_END.replace("<pad>", "<|end|>")
    text = "<s>user: 3 + 4?<|end|>\nassistant: 7<|end|>\nuser: Twice?<|end|>\nassistant: 14<|end|>\n</s>"
    assert contexts(template, TWO) == [(text, "7<|end|>14<|end|>\n</s>")]


@pytest.mark.parametrize("end", ["[end]", "<|end|>"])
def test_another_end_token_for_the_last_answer_is_learned_in_each(contexts: Contexts, tok: Any, end: str) -> None:
    tok.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    last = f"eos_token if loop.last and m.role == 'assistant' else '{end}'"
    template = PLAIN.replace("eos_token if m.role == 'assistant' else '|'", last)
    first = f"<s>user: 3 + 4?{end}assistant: 7"
    second = f"{first}{end}user: Twice?{end}assistant: 14</s>"
    assert contexts(template, TWO) == [(f"{first}</s>", "7</s>"), (second, "14</s>")]


def test_every_answer_ends_where_the_template_has_no_end_token(contexts: Contexts) -> None:
    template = PLAIN.replace("eos_token if m.role == 'assistant' else '|'", "'|'")
    first = "<s>user: 3 + 4?|assistant: 7|"
    assert contexts(template, TWO) == [
        (f"{first}</s>", "7|</s>"), (f"{first}user: Twice?|assistant: 14|</s>", "14|</s>")
    ]  # fmt: skip


def test_a_control_token_before_the_words_is_no_end(contexts: Contexts, tok: Any) -> None:
    tok.add_special_tokens({"extra_special_tokens": ["<|mid|>"]})
    template = PLAIN.replace("eos_token if m.role == 'assistant' else '|'", "'|'").replace(
        "m.content +", "('<|mid|>' if m.role == 'assistant' else '') + m.content +"
    )
    assert contexts(template, TWO[:2]) == [(f"{ASKED}<|mid|>7|</s>", "<|mid|>7|</s>")]


def test_a_template_that_counts_the_turns_gives_each_answer_its_own_count(contexts: Contexts) -> None:
    template = PLAIN.replace("{{ bos_token }}", "{{ bos_token ~ messages|length }}")
    second = "<s>3user: 3 + 4?|assistant: 7</s>user: Twice?|assistant: 14</s>"
    assert contexts(template, TWO) == [("<s>1user: 3 + 4?|assistant: 7</s>", "7</s>"), (second, "14</s>")]


def test_a_system_text_that_moves_to_the_last_question_is_where_each_answer_meets_it(contexts: Contexts) -> None:
    template = (
        "{%- set first = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{% set is_last = loop.last or (loop.length - loop.index == 1 and not add_generation_prompt) %}"
        "{{ '[' + (first + ' ' if is_last else '') }}"
        "{{ m.content + ']' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    got = contexts(template, [{"role": "system", "content": "Kind."}, *TWO])
    assert got == [("<s>[Kind. 3 + 4?]7</s>", "7</s>"), ("<s>[3 + 4?]7</s>[Kind. Twice?]14</s>", "14</s>")]


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
DROPS_SYSTEM = PLAIN.replace("for m in messages", "for m in messages if m.role != 'system'")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refuses", "drops"])
def test_a_system_text_without_a_place_goes_before_the_first_question(
    contexts: Contexts, prepare: Call, tok: Any, tmp_path: Path, template: str
) -> None:
    turns = [{"role": "system", "content": "Be kind."}, *TWO]
    asked = "<s>user: Be kind.\n\n3 + 4?|assistant: "
    assert contexts(template, turns) == [(f"{asked}7</s>{LATER}14</s>", "7</s>14</s>")]
    done = prepare([{"messages": turns}], chat_template=str(tmp_path / "t.jinja"))
    assert done.ledger.notes == {"system text put before the first question": 1}
    asked_alone = encode_chat([Turn("system", "Be kind."), Turn("user", "3 + 4?")], tok)
    assert tok.decode(asked_alone) == asked


def test_results_become_one_user_turn_where_the_template_has_no_tool_role(contexts: Contexts) -> None:
    turns = [ask("Go"), say("call it"), *({"role": "tool", "content": text} for text in "ab"), say("Done.")]
    assert contexts(PLAIN, turns)[0][0] == "<s>user: Go|assistant: call it</s>user: a\n\nb|assistant: Done.</s>"
    # A template that knows calls, and writes every role by its name, has a tool role.
    named = "<s>user: Go|assistant: call it</s>tool: a|tool: b|assistant: Done.</s>"
    assert contexts(PLAIN + "{# knows tool_calls #}", turns)[0][0] == named
    refuses = "{% if messages|selectattr('role', 'eq', 't' ~ 'ool')|list %}{{ raise_exception('no tools') }}{% endif %}"
    assert "user: a\n\nb|" in contexts(PLAIN + refuses + "{# knows tool_calls #}", turns)[0][0]


CHANNELS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}{{ '<why>' + m.thinking + '<unk>assistant' }}{% endif %}"
    "{{ '<say>' + m.content + (eos_token if loop.last else '<unk>') }}{% else %}{{ ': ' + m.content + '<unk>' }}"
    "{% endif %}{% endfor %}{{ 'assistant' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    ("said", "learned"),
    [
        (say("Hello."), "<say>Hello.</s>"),
        (say("Hello.", thinking="greet"), "<why>greet<unk>assistant<say>Hello.</s>"),
        (say("Hello.", thinking="Hello"), "<why>Hello<unk>assistant<say>Hello.</s>"),
    ],
)
def test_an_answer_that_nothing_precedes_follows_the_header_of_generation(
    contexts: Contexts, said: dict[str, Any], learned: str
) -> None:
    assert contexts(CHANNELS, [said]) == [("<s>assistant" + learned, learned)]


@pytest.mark.parametrize(("why", "said"), [("It is 14", "It is 14."), ("14", "14"), ("1\n", "14")])
def test_words_that_repeat_the_reasoning_do_not_stand_for_it(contexts: Contexts, why: str, said: str) -> None:
    # The earlier answer ends otherwise than before, so the newest one is located by its header.
    counts = CHANNELS.replace("{{ bos_token }}", "{{ bos_token }}{{ messages|length }} ")
    _first, (_context, learned) = contexts(counts, [*TWO[:3], say(said, thinking=why)])
    assert learned == f"<why>{why}<unk>assistant<say>{said}</s>"


def test_the_header_of_a_first_answer_is_never_cut(contexts: Contexts) -> None:
    no_prompt = CHANNELS.replace("{{ 'assistant' if add_generation_prompt }}", "")
    assert contexts(no_prompt, [say("Hello.")]) == [("<s>assistant<say>Hello.</s>", "Hello.</s>")]
    with pytest.raises(RowsError, match="row 1: the chat template does not write the answer of turn 1 behind its gen"):
        contexts(no_prompt, [say("Hello.", thinking="greet")])


@pytest.mark.parametrize("filter_", ["string", "tojson"])
def test_a_content_in_parts_that_the_template_prints_as_an_object_is_refused(contexts: Contexts, filter_: str) -> None:
    # The content as text loses the answer, so it is tried in parts, which this template prints as they are.
    template = PLAIN.replace("m.content +", "('' if m.content == '14' else m.content|" + filter_ + ") +") + "{# type #}"
    with pytest.raises(RowsError, match="row 1: the chat template leaves out the words '14' of an answer; set --chat"):
        contexts(template, TWO)


def test_a_content_that_spells_a_part_is_text(contexts: Contexts) -> None:
    parts = PLAIN.replace("m.content +", "m.content[0].text +") + "{# type #}"
    words = '{"type": "text", "text": "a"}'
    assert contexts(parts, [ask("3 + 4?"), say(words)]) == [(f"{ASKED}{words}</s>", f"{words}</s>")]


@pytest.mark.parametrize("words", ['{"tag": "</think>"}', "see `</think>` too", "It <think> is </think> so"])
def test_a_closing_tag_that_an_answer_speaks_of_ends_no_reasoning(contexts: Contexts, words: str) -> None:
    assert contexts(PLAIN, [ask("3 + 4?"), say(words)]) == [(f"{ASKED}{words}</s>", f"{words}</s>")]
    spaced = THINKS.replace("+ '</think>' }}", "+ '\n</think>\n' }}")
    with pytest.raises(RowsError, match=r"row 1: the chat template leaves out the words .* of an answer"):
        contexts(spaced, [ask("3 + 4?"), say(words)])
    without_opening = "add</think>7"
    said = "<think>add</think>7</s>"
    assert contexts(THINKS, [ask("3 + 4?"), say(without_opening)]) == [(ASKED + said, said)]


CALLS = {
    "json": "{{ '<call>' + ({'name': c.function.name, 'arguments': c.function.arguments}|tojson) + '</call>' }}",
    "items": "{{ '<call>' + c.function.name }}{% for k, v in c.function.arguments|items %}"
    "{{ ' ' + k + '=' + v|string }}{% endfor %}{{ '</call>' }}",
    "text": "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}",
    "printed": "{{ '<call>' ~ c.function.name ~ ' ' ~ c.function.arguments ~ '</call>' }}",
}
WRITTEN = {
    "json": '<call>{"name": "move", "arguments": {"x": 2, "to": "é"}}</call>',
    "items": "<call>move x=2 to=é</call>",
    "text": '<call>move {"x": 2, "to": "é"}</call>',
    "printed": '<call>move {"x": 2, "to": "é"}</call>',
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("content", [None, "", "I go."])
def test_arguments_as_text_and_as_object_give_the_same_tokens(contexts: Contexts, name: str, content: Any) -> None:
    template = PLAIN.replace("m.content +", "(m.content or '') + (calls(m.tool_calls) if m.tool_calls else '') +")
    macro = "{% macro calls(all) %}{% for c in all %}" + CALLS[name] + "{% endfor %}{% endmacro %}"
    arguments = {"x": 2, "to": "é"}
    forms = (arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False))
    got = [contexts(macro + template, [ask("Go"), say(content, tool_calls=[call("move", form)])]) for form in forms]
    learned = (content or "") + WRITTEN[name] + "</s>"
    assert got == [[("<s>user: Go|assistant: " + learned, learned)]] * 3


def test_a_call_without_words_is_found_though_it_is_printed_another_way_later(contexts: Contexts) -> None:
    result = {"role": "tool", "content": "ok"}
    turns = [ask("Go"), say(None, tool_calls=[call("move", {"x": 2})]), result, say("There.")]
    called = '<call>move{"x": 2}</call></s>'
    first = f"<s>user: Go|assistant: <think></think>{called}"
    second = f"<s>user: Go|assistant: {called}tool: ok|assistant: <think></think>There.</s>"
    assert contexts(THINKS, turns) == [(first, f"<think></think>{called}"), (second, "<think></think>There.</s>")]


FIRST_CALL = PLAIN.replace("{{ m.role", "{% set calls = m.tool_calls %}{{ m.role").replace(
    "m.content +", "m.content + (calls[0].function.name ~ calls[0].function.arguments|tojson if calls else '') +"
)


@pytest.mark.parametrize("second", [call("turn", {"x": 3}, 2), call("move", {"x": 3}, 2), call("move", {"x": 2}, 2)])
def test_a_second_call_that_the_template_drops_is_refused(contexts: Contexts, second: Any) -> None:
    one = call("move", {"x": 2})
    assert contexts(FIRST_CALL, [ask("Go"), say("", tool_calls=[one])])[0][1] == 'move{"x": 2}</s>'
    with pytest.raises(RowsError, match=r"row 1: the chat template leaves out the call of '(turn|move)' of"):
        contexts(FIRST_CALL, [ask("Go"), say("", tool_calls=[one, second])])


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (PLAIN.replace("m.content +", "m.content[:3] +"), [ask("Hi"), say("Hello there")], "the words 'Hello there'"),
        (PLAIN.replace("m.content +", "m.content[:3] +"), [ask("Who is it"), say("I")], "the words 'Who is it'"),
        (
            DROPS_SYSTEM.replace("'system'", "'tool'"),
            [ask("Hi"), say("Look"), {"role": "tool", "content": "found"}, say("So")],
            "the words 'found' of a tool turn",
        ),
        (
            PLAIN.replace("m.content +", "('' if m.tool_calls else m.content) +") + "{# tool_calls #}",
            [ask("Hi"), say("I look", tool_calls=[call("f", {})])],
            "the words 'I look' of an answer",
        ),
    ],
)
def test_words_that_the_template_drops_are_refused(contexts: Contexts, template: str, turns: Any, said: str) -> None:
    with pytest.raises(RowsError, match=f"row 1: the chat template leaves out {said}.*; set --chat_template") as caught:
        contexts(template, turns)
    assert "\n" not in str(caught.value)


def test_tools_that_the_template_drops_are_refused(contexts: Contexts) -> None:
    tools = [{"type": "function", "function": {"name": "move", "parameters": {}}}]
    with pytest.raises(RowsError, match="row 1: the chat template leaves out the tool 'move' of the tools"):
        contexts(PLAIN + "{# tools #}", [ask("Go"), say("No.")], tools=tools)


def test_words_may_be_escaped_and_trimmed(contexts: Contexts) -> None:
    template = PLAIN.replace("m.content +", "(m.content|tojson if m.role == 'user' else m.content|trim) +")
    got = contexts(template, [ask('a "b"\né'), say("  c\n")])
    assert got == [('<s>user: "a \\"b\\"\\né"|assistant: c</s>', "c</s>")]


@pytest.mark.parametrize("flags", [(0, 1), (1, 0)])
def test_an_answer_that_is_not_learned_is_context(contexts: Contexts, flags: tuple[int, int]) -> None:
    turns = [{**turn, **({"weight": flags[k // 2]} if k % 2 else {})} for k, turn in enumerate(FIELD)]
    ((text, learned),) = contexts(THINKS, turns)
    assert learned == ("<think>add</think>7</s>", "<think>double</think>14</s>")[flags.index(1)]
    assert text.endswith(learned)
    with pytest.raises(RowsError, match="row 1: flags turns that are not to be learned, but loss_on is all"):
        contexts(THINKS, turns, loss_on="all")


def test_loss_on_all_refuses_what_the_whole_conversation_leaves_out(contexts: Contexts) -> None:
    text = f"{ASKED}<think>add</think>7</s>"
    assert contexts(THINKS, FIELD[:2], loss_on="all") == [(text, text)]
    with pytest.raises(RowsError, match="row 1: the chat template leaves out the reasoning 'add' of an answer"):
        contexts(THINKS, FIELD, loss_on="all")


MANY = [turn for n in range(6) for turn in (ask(f"Question {n}?"), say(f"Answer {n}.", reasoning_content=f"why {n}"))]


@pytest.mark.parametrize("max_length", [60, 90, 150, 400])
def test_contexts_that_do_not_fit_into_one_tree_are_several_examples(
    prepare: Call, tok: Any, tmp_path: Path, contexts_of: Any, max_length: int
) -> None:
    (tmp_path / "t.jinja").write_text(THINKS)
    settings = {"chat_template": str(tmp_path / "t.jinja")}
    whole = [c for e in prepare([{"messages": MANY}], max_length=10_000, **settings).train for c in contexts_of(e, tok)]
    assert [text for _, text in whole] == [f"<think>why {n}</think>Answer {n}.</s>" for n in range(6)]
    done = prepare([{"messages": MANY}], max_length=max_length, **settings)
    assert all(len(example.input_ids) <= max_length for example in done.train)
    kept = [context for example in done.train for context in contexts_of(example, tok)]
    fitting = [context for context in whole if len(tok(context[0], add_special_tokens=False).input_ids) <= max_length]
    assert [context for context in kept if context in whole] == fitting
    for example, following in pairwise(done.train):  # greedy: no tree takes one more
        rows = [unfold(e.input_ids, e.labels, e.segments) for e in (example, following)]
        assert len(merge_contexts([*rows[0], rows[1][0]])[0]) > max_length
    assert done.ledger.stop_tokens_trained == len(fitting)


@pytest.mark.parametrize(("overlong", "n_answers"), [("drop", 0), ("split", 6), ("truncate", 2)])
def test_overlong_holds_for_the_longest_context(prepare: Call, tmp_path: Path, overlong: str, n_answers: int) -> None:
    (tmp_path / "t.jinja").write_text(THINKS)
    rows = [{"messages": MANY}, {"messages": FIELD[:2]}]
    done = prepare(rows, max_length=90, overlong=overlong, chat_template=str(tmp_path / "t.jinja"))
    assert done.ledger.rows_over_max_length == 1
    assert done.ledger.stop_tokens_trained == n_answers + 1
    assert done.ledger.rows_dropped == (overlong == "drop")
    # Answers of which max_length leaves nothing are counted too.
    assert done.ledger.turns == (1 if overlong == "drop" else 7)
    assert done.ledger.stop_tokens_cut == done.ledger.turns - done.ledger.stop_tokens_trained
    assert done.ledger.rows_truncated == (overlong == "truncate")


@pytest.mark.parametrize("words", ["q", "a </s> q", "</s>", " </s>"])
def test_the_space_before_an_answer_is_learned_whatever_the_answer_spells(
    contexts: Contexts, tok: Any, words: str
) -> None:
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = PLAIN.replace("m.role + ': ' + m.content", "('<unk> ' if m.role == 'assistant' else '') + m.content")
    template = template.replace("'assistant: '", "'<unk>'")
    assert contexts(template, [ask("Q"), say(words)]) == [(f"<s>Q|<unk> {words}</s>", f" {words}</s>")]


def test_a_border_whose_tokens_depend_on_the_answer_is_cut_as_in_generation(contexts: Contexts, tok: Any) -> None:
    tok.add_tokens(["::", "a:"])  # they join the last character of the prompt and the first of the answer
    template = PLAIN.replace("'assistant: ' if", "'assistant:' if").replace("': ' + m.content", "':' + m.content")
    turns = [ask("b"), say(":c"), ask("d"), say("e")]
    got = contexts(template, turns)
    assert [learned for _, learned in got] == [":c</s>", "e</s>"]
    assert got[0][0] == "<s>user:b|assistant::c</s>"


ANY = st.text(st.characters(categories=("L", "N", "P", "Sc", "Zs")), min_size=1, max_size=8)
WORDS = ANY.map(str.strip).filter(bool)
WRITES = {"keeps": "true", "drops": "loop.last", "thinks last": "loop.index0 > last.q"}
ENDS = {"token": "eos_token", "line": "eos_token + '\n'", "none": "''", "only the last": "eos_token if loop.last"}
OPENS = {"no": "", "yes": "<think>"}


def any_template(later: str, end: str, opens: str, trims: bool) -> str:
    """A template by when it writes reasoning, how it ends an answer, what it prompts with, and whether it trims."""
    text = "m.content|trim" if trims else "m.content"
    return (
        "{%- set last = namespace(q=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.q = loop.index0 %}"
        "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' }}"
        "{% if m.role == 'assistant' and (" + WRITES[later] + ") %}"
        "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ " + text + " }}"
        "{% if m.role == 'assistant' %}{{ " + ENDS[end] + " }}{% else %}{{ '|' }}{% endif %}{% endfor %}"
        "{{ '[assistant]" + OPENS[opens] + "' if add_generation_prompt }}"
    )


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(st.tuples(WORDS, WORDS, st.one_of(st.just(""), WORDS), st.booleans()), min_size=1, max_size=5),
    system=st.one_of(st.just(""), WORDS),
    later=st.sampled_from(sorted(WRITES)),
    end=st.sampled_from(sorted(ENDS)),
    opens=st.sampled_from(sorted(OPENS)),
    trims=st.booleans(),
)
def test_what_is_learned_is_what_generation_has_to_produce(
    tok: Any, pairs: list[tuple[str, str, str, bool]], system: str, later: str, end: str, opens: str, trims: bool
) -> None:
    tok.chat_template = any_template(later, end, opens, trims)
    turns = [Turn("system", system)] if system else []
    for question, answer, why, is_learned in pairs:
        turns += [Turn("user", question), Turn("assistant", answer, reasoning=why, learn=is_learned)]
    contexts, _notes = encode_turns(turns, tok, where="row 1")
    found = [(context.ids, answer) for context in contexts for answer in context.answers]
    wanted = [k for k, turn in enumerate(turns) if turn.role == "assistant" and turn.learn]
    assert len(found) == len(wanted)
    messages = [
        {"role": turn.role, "content": turn.content} | ({"reasoning_content": turn.reasoning} if turn.reasoning else {})
        for turn in turns
    ]
    for k, (ids, answer) in zip(wanted, found, strict=True):
        asked = tok.apply_chat_template(messages[:k], tokenize=False, add_generation_prompt=True)
        assert ids[: answer.first] == tok(asked, add_special_tokens=False).input_ids
        newest = tok.apply_chat_template(messages[: k + 1], tokenize=False)
        produced = tok.decode(ids[answer.first : answer.end])
        assert newest.startswith(asked)
        assert produced == newest[len(asked) :].removesuffix("\n").removesuffix("</s>") + "</s>"
        assert ids[answer.end - 1] == tok.eos_token_id
        assert [kind for _, _, kind in answer.spans][-2:] == ["answer", "end"]
