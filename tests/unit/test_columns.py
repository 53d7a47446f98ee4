"""What columns are called, what they hold beside a question and an answer, and what is said of those left over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.data import Prepared
from nybble.errors import RecipeError, RowsError
from nybble.recipe import load_recipe

Call = Callable[..., Prepared]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ 'tools=' + (tools | tojson) + '|' }}{% endif %}{% for m in messages %}"
    "{{ m.role[0] + ':' }}{{ '{' + m.reasoning_content + '}' if m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else '|' }}{% endfor %}{{ 'a:' if add_generation_prompt }}{# knows 'tool' #}"
)
TURNS = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")]


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    return str(tmp_path / "t.jinja")


def messages(role_key: str = "role", content_key: str = "content", **names: str) -> list[dict[str, str]]:
    return [{role_key: names.get(role, role), content_key: content} for role, content in TURNS]


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialogue", "chat"])
@pytest.mark.parametrize(
    "turns",
    [
        messages(),
        messages("from", "value", user="human", assistant="gpt"),
        messages("role", "value", user="User", assistant="ASSISTANT"),
        messages("from", "content", user="prompter", assistant="bot"),
        json.dumps(messages()),
        f" {json.dumps(messages('from', 'value', user='Human', assistant='model'))}",
    ],
    ids=["role", "from", "upper", "bot", "text", "text-from"],
)
def test_a_conversation_is_read_whatever_its_names(learns: Call, template: str, column: str, turns: Any) -> None:
    learns({column: turns}, "<s>u:Q|a:", "A</s>", "u:R|a:", "B</s>", chat_template=template)


def test_a_developer_is_a_system(learns: Call, template: str) -> None:
    row = {"messages": [{"role": "developer", "content": "S"}, *messages()[:2]]}
    learns(row, "<s>s:S|u:Q|a:", "A</s>", chat_template=template)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("question", "answer"),
        ("instruction", "response"),
        ("query", "response"),
        ("problem", "solution"),
        ("input", "output"),
        ("prompt", "response"),
    ],
)
def test_pairs_are_read_by_their_usual_names(learns: Call, template: str, question: str, answer: str) -> None:
    done = learns({"id": 3, question: "Q", answer: "A"}, "<s>u:Q|a:", "A</s>", chat_template=template)
    assert (done.ledger.shape, done.ledger.not_used) == ("qa", {"id": 1})


@pytest.mark.parametrize(("column", "value"), [("answer", 2), ("question", None), ("answer", 0.5)])
def test_pairs_whose_column_holds_no_text_are_refused_by_its_name(
    prepare: Call, template: str, column: str, value: Any
) -> None:
    row = {"question": "Q", "answer": "A", column: value}
    with pytest.raises(RowsError, match=f"row 1: column '{column}' is of type .*, not text"):
        prepare([row], chat_template=template)


def test_pairs_without_a_template_have_alpacas_form(learns: Call) -> None:
    prompt = "<s>### Instruction:\nQ\n\n### Input:\nC\n\n### Response:\n"
    learns({"question": "Q", "context": "C", "answer": "A"}, prompt, "A</s>")


def test_a_result_beside_a_solution_is_used_for_the_exact_match(prepare: Call, template: str) -> None:
    done = prepare([{"problem": "1+1", "solution": "One and one is 2.", "answer": "2"}], chat_template=template)
    assert (done.train[0].answer, done.ledger.not_used) == ("2", {})


def test_what_stands_beside_a_pair_is_used(learns: Call, template: str) -> None:
    row = {
        "question": "R",
        "context": "C",
        "answer": "B",
        "thinking": "T",
        "system_prompt": "S",
        "history": [["Q", "A"]],
    }
    learns(row, "<s>s:S|u:Q|a:", "A</s>", "u:R\n\nC|a:", "{T}B</s>", chat_template=template)


@pytest.mark.parametrize("history", [[["Q", "A"]], json.dumps([["Q", "A"]]), messages()[:2]])
def test_history_may_be_pairs_text_or_messages(learns: Call, template: str, history: Any) -> None:
    row = {"history": history, "messages": [{"role": "system", "content": "S"}, *messages()[2:]]}
    learns(row, "<s>s:S|u:Q|a:", "A</s>", "u:R|a:", "B</s>", chat_template=template)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("column", "tools"),
    [
        ("tools", [TOOL]),
        ("tools", json.dumps([TOOL])),
        ("tools", [json.dumps(TOOL)]),
        ("tool_defs", [{**TOOL, "function": {**TOOL["function"], "parameters": '{"type": "object"}'}}]),
        ("functions", [TOOL["function"]]),
    ],
)
def test_tools_are_the_same_as_text_and_as_objects(learns: Call, template: str, column: str, tools: Any) -> None:
    row = {"messages": messages()[:2], column: tools}
    learns(row, f"<s>tools={json.dumps([TOOL])}|u:Q|a:", "A</s>", chat_template=template)


CALL = {"name": "f", "arguments": {"x": [1]}}


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"type": "function", "id": "c", "function": CALL}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1]}'}}], "content": None},
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "f", "arguments": '{"x": [1]}'}, "content": ""},
        {"from": "function_call", "value": CALL},
        {"from": "tool_call", "value": [CALL]},
    ],
    ids=["object", "arguments", "bare", "text", "old", "sharegpt", "swift"],
)
def test_calls_are_the_same_as_text_and_as_objects(learns: Call, template: str, calls: dict[str, Any]) -> None:
    turn = calls if "from" in calls else {"role": "assistant", **calls}
    row = {"messages": [*messages()[:1], turn]}
    learns(row, "<s>u:Q|a:", f"{json.dumps(CALL)}</s>", chat_template=template)


@pytest.mark.parametrize("call", [{"arguments": ""}, {"arguments": None}, {"arguments": "{}"}, {"arguments": {}}, {}])
def test_a_call_without_arguments_has_an_empty_object(learns: Call, template: str, call: dict[str, Any]) -> None:
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", **call}}]}
    said = '{"name": "f", "arguments": {}}</s>'
    learns({"messages": [*messages()[:1], turn]}, "<s>u:Q|a:", said, chat_template=template)


def test_calls_in_turns_of_their_own_are_calls_where_the_template_has_them(
    learns: Call, template: str, tmp_path: Path
) -> None:
    texts = ['{"name": "f",  "arguments": {"x": [1]}}', '[{"name": "g", "arguments": "{}"}]']
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    turns += [{"from": "Function_Call", "value": text} for text in texts]
    said = f'A{json.dumps(CALL)}{{"name": "g", "arguments": {{}}}}</s>'
    assert "calls" not in " ".join(
        learns({"conversations": turns}, "<s>u:Q|a:", said, chat_template=template).ledger.notes
    )
    # Without a place for calls, they stay the text that they are.
    (tmp_path / "plain.jinja").write_text(TEMPLATE.replace("m.tool_calls", "m.none"))
    said = "\n\n".join(["A", *texts]) + "</s>"
    done = learns({"conversations": turns}, "<s>u:Q|a:", said, chat_template=str(tmp_path / "plain.jinja"))
    assert done.ledger.notes["calls learned as the text that the row has"] == 1


@pytest.mark.parametrize("text", ["call f", '{"x": 1}', "[]", '["f"]', "{"])
def test_a_turn_of_a_caller_that_holds_no_call_is_words(learns: Call, template: str, text: str) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "function_call", "value": text}]
    learns({"conversations": turns}, "<s>u:Q|a:", f"{text}</s>", chat_template=template)


def test_arguments_that_are_no_json_stay_text(learns: Call, template: str) -> None:
    turn = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x = 1"}]}
    said = '{"name": "f", "arguments": "x = 1"}</s>'
    learns({"messages": [*messages()[:1], turn]}, "<s>u:Q|a:", said, chat_template=template)


@pytest.mark.parametrize("column", ["loss_mask", "train", "weight"])
def test_a_column_of_flags_keeps_answers_out(learns: Call, template: str, column: str) -> None:
    row = {"conversations": messages(), column: [0, 0, 0, True]}
    learns(row, "<s>u:Q|a:A</s>u:R|a:", "B</s>", chat_template=template)


@pytest.mark.parametrize(
    ("flags", "said"),
    [([1, 1], "has 2 flags for 4 turns"), ([0, 0, 0, 0.3], "column 'loss_mask' is 0.3; .*--ignore_columns loss_mask")],
)
def test_flags_that_do_not_fit_are_refused(prepare: Call, template: str, flags: Any, said: str) -> None:
    with pytest.raises(RowsError, match=f"row 1: .*{said}"):
        prepare([{"messages": messages(), "loss_mask": flags}], chat_template=template)


@pytest.mark.parametrize("flag", [{"label": False}, {"weight": 0}, {"train": False}])
@pytest.mark.parametrize("row", [{"prompt": "Q:", "completion": "A"}, {"question": "Q", "answer": "A"}])
def test_a_row_whose_answer_is_bad_is_not_learned(prepare: Call, template: str, row: Any, flag: Any) -> None:
    ledger = prepare([row, {**row, **flag}, {**row, "label": True}], chat_template=template).ledger
    assert (ledger.rows_used, ledger.rows_dropped, ledger.turns, ledger.not_used) == (2, 1, 2, {})


def test_earlier_answers_of_a_prompt_are_context(learns: Call, template: str) -> None:
    row = {"prompt": messages()[:3], "completion": messages()[3:]}
    learns(row, "<s>u:Q|a:A</s>u:R|a:", "B</s>", chat_template=template)


def test_a_prompt_of_turns_may_have_a_text_as_answer(learns: Call, template: str) -> None:
    row = {"prompt": messages()[:3], "completion": "B"}
    learns(row, "<s>u:Q|a:A</s>u:R|a:", "B</s>", chat_template=template)


def test_turns_of_one_role_are_joined_and_this_is_said(learns: Call, template: str) -> None:
    turns = [("user", "P"), ("user", "Q"), ("assistant", "A"), ("assistant", "B")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    done = learns(row, "<s>u:P\n\nQ|a:", "A\n\nB</s>", chat_template=template)
    assert done.ledger.notes == {"turns of one role joined": 1}
    assert "turns of one role joined in 1 row" in done.ledger.in_words
    systems = [{"role": role, "content": text} for role, text in (("system", "S"), ("developer", "T"))]
    row = {"messages": [*systems, *messages()[:2]]}
    learns(row, "<s>s:S\n\nT|u:Q|a:", "A</s>", chat_template=template)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"weight": 0}, {}, "the one is learned and the other is not"),
        ({"name": "Ann"}, {"name": "Bo"}, "they have different names"),
        ({}, {"thinking": "T"}, "the second has reasoning of its own"),
        ({"tool_calls": [CALL]}, {}, "the first ends with calls"),
    ],
)
def test_turns_that_cannot_be_joined_are_refused(
    prepare: Call, template: str, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    answers = [{"role": "assistant", "content": "A", **keys} for keys in (first, second)]
    with pytest.raises(RowsError, match=f"row 1 turn 3: 'assistant' follows .* cannot be joined because {said}"):
        prepare([{"messages": [*messages()[:1], *answers]}], chat_template=template)


def test_what_is_not_used_is_counted_by_name(prepare: Call, template: str) -> None:
    turns = [{**messages()[0], "id": 1}, messages()[1]]
    rows = [
        {"messages": turns, "source": "web", "score": 0},
        {"messages": messages(), "source": "", "tools": None},
        {"messages": messages(), "source": "x"},
    ]
    done = prepare(rows, chat_template=template)
    assert done.ledger.not_used == {"source": 2, "score": 1, "messages.id": 1}
    assert "not used: source in 2 rows, score in 1 row, messages.id in 1 row" in done.ledger.in_words


def test_thousands_of_names_are_counted_together(prepare: Call) -> None:
    rows = [{"text": "a", "every": 1, **{f"name {n} {k}\n": 1 for k in range(20)}} for n in range(30)]
    not_used = prepare(rows).ledger.not_used
    assert (len(not_used), not_used["every"], not_used["(others)"]) == (51, 30, 600 - 49)
    assert not any("\n" in name for name in not_used)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "system": "S"}, "'system' holds what text rows do not use; --columns question=..,answer=.."),
        (
            {"prompt": "a", "completion": "b", "thinking": "T"},
            "'thinking' .*; --columns question=prompt,answer=completion",
        ),
        ({"messages": messages(), "reasoning": "T"}, "'reasoning' .*; write it into the messages"),
        ({"messages": messages(), "images": ["x.png"]}, "'images' .*; only text is learned"),
        (
            {"messages": [{**messages()[0], "images": ["x"]}, messages()[1]]},
            "'messages.images' .*; only text is learned",
        ),
    ],
)
def test_words_that_would_be_dropped_are_refused(prepare: Call, template: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowsError, match=f"row 1: {said}") as caught:
        prepare([row], chat_template=template)
    advice = str(caught.value).rpartition("--ignore_columns ")[2]
    done = prepare([row], chat_template=template, ignore_columns=advice, allow_no_stop=True)
    assert done.ledger.not_used == {advice: 1}


def test_alpaca_rows_without_a_template_refuse_a_system_text(prepare: Call) -> None:
    with pytest.raises(RowsError, match=r"row 1: 'system' .*; set --chat_template, which takes it"):
        prepare([{"instruction": "I", "output": "O", "system": "S"}])


def test_two_system_texts_are_refused(prepare: Call, template: str) -> None:
    turns = [{"role": "system", "content": "S"}, *messages()]
    prepare([{"messages": turns, "system": "S"}], chat_template=template)
    with pytest.raises(RowsError, match="row 1: the column for the system text and the first turn differ"):
        prepare([{"messages": turns, "system": "other"}], chat_template=template)


def test_columns_may_be_named(learns: Call, template: str) -> None:
    row = {"ask": "Q", "reply": "A", "rules": "S", "system": 3}
    named = "question=ask,answer=reply,system=rules"
    done = learns(row, "<s>s:S|u:Q|a:", "A</s>", chat_template=template, columns=named, ignore_columns="system")
    assert done.ledger.not_used == {"system": 1}
    learns({"question": "Q:", "response": "A"}, "<s>Q:", "A</s>", columns="prompt=question,completion=response")
    learns({"log": messages()[:2]}, "<s>u:Q|a:", "A</s>", columns="messages=log", chat_template=template)


@pytest.mark.parametrize("named", ["answer", "answer=", "reply=a", "answer=a,answer=b"])
def test_names_of_columns_are_checked(named: str) -> None:
    with pytest.raises(RecipeError, match=r"data.columns: got .*; .* names no column; write role=column once a role"):
        load_recipe(None, {"columns": named})


def test_a_named_column_that_has_no_place_is_refused(prepare: Call) -> None:
    with pytest.raises(RowsError, match="row 1: 'rules' holds what prompt_completion rows do not use"):
        prepare([{"prompt": "a", "completion": "b", "rules": "c"}], columns="system=rules")


def test_a_named_column_that_is_missing_is_refused(prepare: Call) -> None:
    with pytest.raises(RowsError, match="row 1: has no column 'ask', which --columns names; it has text"):
        prepare([{"text": "a"}], columns="question=ask,answer=text")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "chosen, rejected .* --columns question=prompt,answer=chosen",
        ),
        ({"chosen": messages(), "rejected": messages()}, "chosen, rejected .* --columns messages=chosen"),
        ({"chosen": "a", "rejected": "b"}, "chosen, rejected .* --dataset_text_field chosen"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, "responses, scores .* write rows with one answer"),
    ],
)
def test_ranked_rows_are_named(prepare: Call, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowsError, match=f"row 1: the columns {said}"):
        prepare([row])


def test_bad_rows_are_skipped_counted_and_named(prepare: Call, template: str) -> None:
    rows: list[dict[str, Any]] = [{"question": f"{n:02}", "answer": "A"} for n in range(40)]
    for bad in range(0, 24, 2):
        rows[bad] = [{"question": 1, "answer": "A"}, {"other": 1}, {"question": "Q", "answer": None}][bad // 2 % 3]
    rows[0], rows[1] = rows[1], rows[0]
    whole = prepare(rows, chat_template=template, on_bad_row="skip", eval_fraction=0.1)
    ledger = whole.ledger
    assert (ledger.rows_read, ledger.rows_skipped, ledger.rows_used + ledger.rows_held_out) == (40, 12, 28)
    assert (ledger.rows_dropped, ledger.rows_duplicate, ledger.length_p50) == (0, 0, ledger.length_max)
    assert len(ledger.skipped) == 10
    assert "row 2: column 'question' is of type int" in ledger.skipped[0]
    assert "row 3: column 'question' is missing" in ledger.skipped[1]
    assert any("12 rows are skipped" in line for line in ledger.in_words)
    assert all(example.n_trained for example in [*whole.train, *whole.held_out])
    with pytest.raises(RowsError, match="row 2: column 'question' is of type int"):
        prepare(rows, chat_template=template)


def test_rows_that_are_all_bad_are_refused(prepare: Call, template: str) -> None:
    with pytest.raises(RowsError, match=r"none of the 2 rows can be used; the first: .*row 1: has no assistant turn"):
        prepare([{"messages": messages()[:1]}] * 2, chat_template=template, on_bad_row="skip")
