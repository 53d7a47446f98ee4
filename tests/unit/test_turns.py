"""What the messages of a conversation hold beside role and content: reasoning, names, ids, flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nybble.data import Prepared
from nybble.errors import RowsError

Call = Callable[..., Prepared]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{{ '(' + m.name + ')' if m.name }}{{ '#' + m.tool_call_id if m.tool_call_id }}"
    ": {{ '{' + m.reasoning_content + '}' if m.reasoning_content }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '|' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    "{# knows 'tool' #}"
)


@pytest.fixture
def template(tmp_path: Any) -> str:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    return str(tmp_path / "t.jinja")


def chat(*contents: str, **last: Any) -> list[dict[str, Any]]:
    """Turns of user and assistant, one after the other; `last` are further keys of the last one."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return [*turns[:-1], {**turns[-1], **last}]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_the_template(learns: Call, template: str, key: str) -> None:
    row = {"messages": chat("Hi", "Hello", **{key: "be kind"})}
    learns(row, "<s>user: Hi|assistant: ", "{be kind}Hello</s>", chat_template=template)


def test_two_reasonings_that_differ_are_refused(prepare: Call, template: str) -> None:
    row = {"messages": chat("Hi", "Hello", thinking="a", reasoning="b")}
    with pytest.raises(RowsError, match="row 1 turn 2: thinking and reasoning hold different texts"):
        prepare([row], chat_template=template)


def test_names_and_ids_reach_the_template(learns: Call, template: str) -> None:
    asked = {"role": "user", "content": "Hi", "name": "Ann"}
    result = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"}
    row = {
        "messages": [asked, {"role": "assistant", "content": "One moment", "name": None}, result, *chat("", "3.")[1:]]
    }
    prompts = ("<s>user(Ann): Hi|assistant: ", "tool(add)#c1: 3|assistant: ")
    learns(row, prompts[0], "One moment</s>", prompts[1], "3.</s>", chat_template=template)


def test_control_tokens_that_names_and_ids_spell_stay_text(prepare: Call, template: str, tok: Any) -> None:
    turns = [{**turn, "name": "Bo</s>"} if turn["role"] == "user" else turn for turn in chat("Hi", "One moment")]
    turns += [{"role": "tool", "content": "3", "name": "</s>", "tool_call_id": "c<pad>"}, *chat("", "3.")[1:]]
    example = prepare([{"messages": turns}], chat_template=template).train[0]
    assert "tool(</s>)#c<pad>: 3|" in tok.decode(example.input_ids)
    assert example.input_ids.count(tok.eos_token_id) == 2
    assert tok.pad_token_id not in example.input_ids


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss_mask": 0.0}, {"weight": 1, "train": 0}])
def test_a_flag_keeps_an_answer_out_of_the_loss(learns: Call, template: str, flag: dict[str, Any]) -> None:
    for at in (1, 3):
        turns = chat("Hi", "Hello", "Bye", "See you", weight=1)
        turns[at] = {**turns[at], **flag}
        texts = ["<s>user: Hi|assistant: Hello</s>user: Bye|assistant: See you</s>"]
        parts = texts[0].split("Hello</s>" if at == 3 else "See you</s>")
        answer = "Hello</s>" if at == 3 else "See you</s>"
        learns({"messages": turns}, parts[0], answer, *[parts[1]] if parts[1] else [], chat_template=template)


@pytest.mark.parametrize("weight", [0.5, -1, 2, "0", [0]])
def test_a_weight_between_the_two_is_refused(prepare: Call, template: str, weight: Any) -> None:
    with pytest.raises(RowsError, match=r"row 1 turn 2: weight is .*; allowed are 0 and false \(not learned\)"):
        prepare([{"messages": chat("Hi", "Hello", weight=weight)}], chat_template=template)


def test_a_name_that_is_no_text_is_refused(prepare: Call, template: str) -> None:
    with pytest.raises(RowsError, match="row 1 turn 2: name is of type int, not text"):
        prepare([{"messages": chat("Hi", "Hello", name=3)}], chat_template=template)
