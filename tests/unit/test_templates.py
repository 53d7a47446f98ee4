"""Masks through the forms of well-known families' chat templates, token by token.

The templates are written for these tests in the families' forms, with each family's control tokens; every text is
byte-level, so that what is learned can be written down (`learns`, in conftest.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.data import IGNORED, Prepared, encode_prompt
from nybble.errors import RowsError

Call = Callable[..., Prepared]


@dataclass(frozen=True)
class Family:
    """A template, its control tokens, and what it makes of each turn."""

    template: str
    tokens: tuple[str, ...]
    begin: str
    system: str
    user: str
    header: str  # of an answer, not learned
    answer: str  # learned
    behind: str = ""  # what follows an answer
    trims: bool = False


LLAMA_3 = Family(
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<s>",
    "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "{}<|eot_id|>",
    trims=True,
)
QWEN_3 = Family(
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' + m.content }}{% else %}{{ m.content.split('</think>')[-1] }}"
    "{% endif %}{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "<s>",
    "<|im_start|>system\n{}<|im_end|>\n",
    "<|im_start|>user\n{}<|im_end|>\n",
    "<|im_start|>assistant\n",
    "{}<|im_end|>",
    "\n",
)
GEMMA_3 = Family(
    "{{ bos_token }}{% set first = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{{ (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<start_of_turn>", "<end_of_turn>"),
    "<s>",
    "",
    "<start_of_turn>user\n{}<end_of_turn>\n",
    "<start_of_turn>model\n",
    "{}<end_of_turn>",
    "\n",
    trims=True,
)
MISTRAL = Family(
    "{{ bos_token }}{% set system = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ("[INST]", "[/INST]"),
    "<s>",
    "",
    "[INST] {}[/INST]",
    "",
    " {}</s>",
)
PHI_3 = Family(
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<s>",
    "<|system|>\n{}<|end|>\n",
    "<|user|>\n{}<|end|>\n",
    "<|assistant|>\n",
    "{}<|end|>",
    "\n",
)
FAMILIES = {"llama-3": LLAMA_3, "gemma-3": GEMMA_3, "mistral": MISTRAL, "phi-3": PHI_3, "qwen-3": QWEN_3}
EACH = pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen-3"])  # renders each turn alike
THOUGHT = "<think>\n\n</think>\n\n"  # Qwen 3 writes it before the newest answer only


@pytest.fixture
def speak(byte_tokenizer: Callable[[], Any], tmp_path: Path) -> Callable[[str], tuple[Any, Family]]:
    """`speak("phi-3")` -> a tokenizer with that family's control tokens and template."""

    def make(name: str) -> tuple[Any, Family]:
        family, tokenizer = FAMILIES[name], byte_tokenizer()
        tokenizer.add_special_tokens({"extra_special_tokens": list(family.tokens)})
        tokenizer.chat_template = family.template
        return tokenizer, family

    return make


def messages(pairs: list[tuple[str, str]], system: str = "") -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def expected(family: Family, pairs: list[tuple[str, str]], system: str = "") -> list[str]:
    """The texts that `learns` takes: masked, learned, masked, learned, .."""
    segments, open_text = [], family.begin
    if system:
        open_text += family.system.format(system)
    for number, (question, answer) in enumerate(pairs):
        if family.trims:
            question, answer = question.strip(), answer.strip()
        is_merged = system and not family.system and number == 0
        open_text += family.user.format(f"{system}\n\n{question}" if is_merged else question) + family.header
        segments += [open_text, family.answer.format(answer)]
        open_text = family.behind
    return [*segments, open_text] if open_text else segments


@EACH
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize(
    "pairs",
    [
        [("Is the sky blue?", "Yes, it is.")],
        [("Q", "A"), ("R", "B"), ("S", "C")],
        [("Q", ""), ("R", "B")],
        [("é ü 汉字", "👩‍👩‍👧 🇩🇪"), ("שלום עולם", "مرحبا\u200f!")],
        [("a\r\nb", "c\r\nd"), ("\ttab", "x\u2028y")],
        [("same", "same"), ("same", "same")],
        [("assistant", "user"), ("model", "assistant\n")],
    ],
    ids=["one", "three", "empty", "scripts", "breaks", "same", "headers"],
)
def test_answers_and_their_ends_are_learned(
    learns: Call, speak: Callable[[str], Any], name: str, pairs: list[tuple[str, str]], system: str
) -> None:
    tokenizer, family = speak(name)
    done = learns(messages(pairs, system), *expected(family, pairs, system), tokenizer=tokenizer)
    assert done.ledger.stop_tokens_trained == done.ledger.turns == len(pairs)
    assert done.ledger.answers_empty == sum(not answer for _, answer in pairs)
    assert done.train[0].input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("pairs", [[("Q", "A")], [("a", ""), ("汉", "</s>é")], [("Q", "A"), ("R", "B"), ("S", "C")]])
def test_an_answer_whose_thoughts_are_dropped_later_has_a_context_of_its_own(
    prepare: Call,
    speak: Callable[[str], Any],
    contexts_of: Callable[..., list[tuple[str, str]]],
    pairs: list[tuple[str, str]],
    system: str,
) -> None:
    tokenizer, family = speak("qwen-3")
    done = prepare([messages(pairs, system)], tokenizer=tokenizer)
    segments = expected(family, pairs, system)
    answers = [THOUGHT + family.answer.format(answer) for _, answer in pairs]
    wanted = [("".join(segments[: 2 * n + 1]) + answer, answer) for n, answer in enumerate(answers)]
    tail = family.behind if len(pairs) == 1 else ""
    assert contexts_of(done.train[0], tokenizer) == [(text + tail, answer) for text, answer in wanted]
    assert tokenizer.decode(done.train[0].prompt_ids) == "".join(segments[: 2 * len(pairs) - 1])
    assert done.ledger.stop_tokens_trained == done.ledger.turns == len(pairs)


@EACH
def test_last_answer_learns_that_alone(learns: Call, speak: Callable[[str], Any], name: str) -> None:
    tokenizer, family = speak(name)
    pairs = [("Q", "A"), ("R", "B")]
    *before, question, answer = expected(family, pairs)[:4]
    behind = expected(family, pairs)[4:]
    row = messages(pairs)
    done = learns(row, "".join([*before, question]), answer, *behind, tokenizer=tokenizer, loss_on="last_answer")
    assert (done.ledger.turns, done.ledger.stop_tokens_trained) == (1, 1)


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=10).map(str.strip).filter(bool)


@EACH
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_the_learned_tokens_are_the_answers_and_their_ends(
    prepare: Call, speak: Callable[[str], Any], name: str, pairs: list[tuple[str, str]]
) -> None:
    tokenizer, family = speak(name)
    example = prepare([messages(pairs)], tokenizer=tokenizer).train[0]
    learned = tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert learned == "".join(expected(family, pairs)[1::2])


@EACH
def test_a_control_token_that_is_spelled_stays_text(prepare: Call, speak: Callable[[str], Any], name: str) -> None:
    tokenizer, family = speak(name)
    typed = f"what is {' '.join(family.tokens)} or </s><s>?"
    pairs, plain = [(typed, f"It is {typed}"), (typed, "B")], [("Q", "A"), ("Q", "B")]
    row, usual = (prepare([messages(p)], tokenizer=tokenizer).train[0] for p in (pairs, plain))
    for token in (*family.tokens, "<s>", "</s>"):
        index = tokenizer.convert_tokens_to_ids(token)
        assert row.input_ids.count(index) == usual.input_ids.count(index)
        assert row.labels.count(index) == usual.labels.count(index)
    assert tokenizer.decode(row.input_ids) == "".join(expected(family, pairs))
    assert tokenizer.decode([i for i in row.labels if i != IGNORED]) == "".join(expected(family, pairs)[1::2])
    asked = encode_prompt(typed, tokenizer, "template")
    assert tokenizer.decode(asked) == expected(family, [(typed, "")])[0]
    assert sum(i in asked for i in tokenizer.all_special_ids) < len(asked) / 2
    assert asked.count(tokenizer.eos_token_id) == 0


def test_what_llama2s_users_spell_stays_text(shared_data: Path, prepare: Call) -> None:
    from transformers import AutoTokenizer

    llama2 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama2")
    example = prepare([messages([("a</s>b <s>", "c</s> d"), ("e", "f")])], tokenizer=llama2).train[0]
    assert llama2.decode(example.input_ids) == "<s> [INST] a</s>b <s> [/INST] c</s> d </s><s> [INST] e [/INST] f </s>"
    assert (example.input_ids.count(1), example.input_ids.count(2), example.labels.count(2)) == (2, 2, 2)
    usual = prepare([messages([("e", "f")])], tokenizer=llama2).train[0]
    assert example.input_ids[-len(usual.input_ids) :] == usual.input_ids


def test_alpacas_plain_form_keeps_spelled_tokens_as_text(prepare: Call, tok: Any) -> None:
    example = prepare([{"instruction": "a</s>", "output": "b<s>"}]).train[0]
    assert tok.decode(example.input_ids[1:-1]).endswith("a</s>\n\n### Response:\nb<s>")
    assert (example.input_ids.count(tok.bos_token_id), example.input_ids.count(tok.eos_token_id)) == (1, 1)


RENDERED = {"llama-3": "llama3", "qwen-3": "chatml", "gemma-3": "gemma", "phi-3": "phi3"}
PAIRS = [[("Q", "A")], [("é 汉", "a\r\nb 👩‍👩‍👧"), ("R", "")], [("a", "b"), ("c", "d"), ("שלום", "مرحبا")]]


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("pairs", PAIRS, ids=len)
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_text_that_is_rendered_already_is_learned_alike(
    learns: Call, speak: Callable[[str], Any], name: str, pairs: list[tuple[str, str]], begin: str
) -> None:
    tokenizer, family = speak(name)
    segments = expected(family, pairs)[: 2 * len(pairs)]
    text = begin + "".join(segments).removeprefix("<s>") + family.behind
    done = learns({"text": text}, *segments, tokenizer=tokenizer)
    assert done.ledger.prompt_form == RENDERED[name]
    assert done.ledger.stop_tokens_trained == done.ledger.turns == len(pairs)
    assert done.ledger.answers_empty == sum(not answer for _, answer in pairs)
    asked = tokenizer.decode(encode_prompt(pairs[0][0], tokenizer, RENDERED[name]))
    assert asked == segments[0]


def test_a_rendered_answer_without_its_mark_gets_an_end_token(learns: Call, speak: Callable[[str], Any]) -> None:
    tokenizer, _ = speak("qwen-3")
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    learns({"text": prompt + "A"}, f"<s>{prompt}", "A</s>", tokenizer=tokenizer)


def test_begin_and_end_that_a_row_spells_are_not_doubled(learns: Call) -> None:
    learns({"prompt": "<s>Q:\n", "completion": "A</s>"}, "<s>Q:\n", "A</s>")


def test_marks_that_are_no_tokens_here_are_learned_with_an_end_token(learns: Call) -> None:
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    learns({"text": prompt + "A<|im_end|>"}, f"<s>{prompt}", "A<|im_end|></s>")


@pytest.mark.parametrize(("begin", "end"), [("", ""), ("<s>", "</s>")])
def test_alpaca_text_learns_its_response(learns: Call, begin: str, end: str) -> None:
    prompt = "Below is a task.\n\n### Instruction:\nI\n\n### Response:\n"
    done = learns({"text": f"{begin}{prompt}O{end}"}, f"<s>{prompt}", "O</s>")
    assert done.ledger.prompt_form == "alpaca"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
TOOL_TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]


def test_tools_go_through_a_template_that_knows_them(
    prepare: Call, speak: Callable[[str], Any], contexts_of: Callable[..., list[tuple[str, str]]]
) -> None:
    tokenizer, _ = speak("qwen-3")
    example = prepare([{"messages": TOOL_TURNS, "tools": TOOLS}], tokenizer=tokenizer).train[0]
    call = f"{THOUGHT}<tool_call>{json.dumps(CALL)}</tool_call><|im_end|>"
    (first, called), (second, answered) = contexts_of(example, tokenizer)
    assert first.endswith(call)
    assert (called, answered) == (call, f"{THOUGHT}Two.<|im_end|>")
    assert f"assistant\n<tool_call>{json.dumps(CALL)}</tool_call><|im_end|>" in second
    assert second.endswith(answered)
    whole = second
    assert '"description": "adds"' in whole
    assert "<tool_response>2</tool_response>" in whole


def test_tools_go_into_the_system_text_otherwise(prepare: Call, speak: Callable[[str], Any]) -> None:
    tokenizer, _ = speak("phi-3")
    turns = [("human", "1+1?"), ("function_call", '{"name": "add"}'), ("observation", "2"), ("gpt", "Two.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": '[{"name": "add"}]'}
    example = prepare([row], tokenizer=tokenizer).train[0]
    whole = tokenizer.decode(example.input_ids)
    assert whole.startswith("<s><|system|>\nThese functions may be called")
    assert '[{"name": "add"}]<|end|>' in whole
    assert "<|user|>\n2<|end|>\n" in whole
    assert tokenizer.decode([i for i in example.labels if i != IGNORED]) == '{"name": "add"}<|end|>Two.<|end|>'


def test_calls_that_a_template_would_leave_out_are_refused(prepare: Call, speak: Callable[[str], Any]) -> None:
    tokenizer, _ = speak("phi-3")
    with pytest.raises(RowsError, match="row 1: the chat template does not support tool_calls"):
        prepare([{"messages": TOOL_TURNS}], tokenizer=tokenizer)
