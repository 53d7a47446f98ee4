"""Ollama's templates say what the tokenizer's say, by a reader of the part of Go's template language that they use."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nybble.data import render_chat
from nybble.errors import ModelError, RowsError
from nybble.exporting.ollama import modelfile, ollama_template

trl = pytest.importorskip("trl", reason="trl is not installed")

SYSTEM = {"role": "system", "content": "Be brief."}
ASK, REPLY = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}
CHATS = {
    "asked": [ASK],
    "told": [SYSTEM, ASK],
    "again": [ASK, REPLY, ASK],
    "told again": [SYSTEM, ASK, REPLY, ASK],
    "three": [SYSTEM, ASK, REPLY, ASK, REPLY, ASK],
}
SHIPPED = sorted(f for f in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "_training" not in f.name)
FIELDS = {"idefics3", "llava_next", "smolvlm"}  # templates that take a message's content as a list only
TURNS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + (eos_token if m.role == 'assistant' else '') }}"
# Templates of our own, of each kind that one exchange cannot express.
OWN = {
    "default before all": "{{ bos_token }}{% if messages[0].role != 'system' %}<system>Help.{% endif %}"
    + TURNS
    + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "another end at the end": "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{{ '<done>' if loop.last and m.role == 'assistant' else '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "thoughts asked for": TURNS + "{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
    "a preface once": "{{ bos_token }}Rules:\n"
    + TURNS
    + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}


def parsed(template: str) -> list[Any]:
    """Texts, tags as `(tag,)`, and blocks as lists of `(condition, nodes)`."""
    parts = re.split(r"{{ (.*?) }}", template, flags=re.DOTALL)
    place = 0

    def block() -> list[Any]:
        nonlocal place
        nodes: list[Any] = []
        while place < len(parts):
            part, is_tag = parts[place], place % 2
            if is_tag and (part == "end" or part.startswith("else")):
                break
            place += 1
            if is_tag and part.startswith(("if ", "range ")):
                branches = [(part, block())]
                while parts[place] != "end":
                    condition = parts[place].removeprefix("else").strip()
                    place += 1
                    branches.append((condition, block()))
                place += 1
                nodes.append(branches)
            else:
                nodes.append((part,) if is_tag else part)
        return nodes

    return block()


def said(nodes: list[Any], fields: dict[str, Any], message: dict[str, str], names: dict[str, Any]) -> str:
    def holds(condition: str) -> bool:
        word = condition.removeprefix("if ")
        if word.startswith("eq .Role"):
            return message["role"] == word.split('"')[1]
        known = {"": True, "$last": names.get("last"), "not $last": not names.get("last"), ".System": fields["System"]}
        return bool(known[word])

    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif isinstance(node, tuple) and node[0].startswith("$last"):
            names["last"] = names["place"] == len(fields["Messages"]) - 1
        elif isinstance(node, tuple):
            text += message["content"] if node[0] == ".Content" else fields[node[0].removeprefix(".")]
        elif node[0][0].startswith("range"):
            for place, one in enumerate(fields["Messages"]):
                text += said(node[0][1], fields, one, {"place": place})
        else:
            text += next((said(body, fields, message, names) for condition, body in node if holds(condition)), "")
    return text


def ollama(template: str, chat: list[dict[str, str]]) -> str:
    """What Ollama makes of a chat: the template of all messages, or that of one exchange, again and again."""
    fields = {"System": "".join(m["content"] for m in chat if m["role"] == "system"), "Messages": chat}
    if ".Messages" in template:
        return said(parsed(template), fields, {}, {})
    text, exchange = "", {"System": "", "Prompt": "", "Response": ""}
    words = {"system": "System", "user": "Prompt", "assistant": "Response"}
    for message in chat:
        if message["role"] == "user" and exchange["Response"]:
            text += said(parsed(template), exchange, {}, {})
            exchange = dict.fromkeys(exchange, "")
        exchange[words[message["role"]]] = message["content"]
    return text + said(parsed(template.partition("{{ .Response }}")[0]), exchange, {}, {})


@pytest.fixture
def tokenizer(tiny_llama: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama())


def check(tokenizer: Any) -> str:
    notes: list[str] = []
    template = ollama_template(tokenizer, "template", notes.append)
    refused = set()
    for name, chat in CHATS.items():
        try:
            expected = render_chat(tokenizer, chat, "chat", asks=True).removeprefix(tokenizer.bos_token)
        except RowsError:  # no system text here
            refused.add(name)
            continue
        assert ollama(template, chat) == expected, name
    assert bool(notes) is bool(refused)
    return template


@pytest.mark.parametrize("file", [f for f in SHIPPED if f.stem not in FIELDS], ids=lambda f: f.stem)
def test_templates_of_the_field_are_said_exactly(file: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    check(tokenizer)


@pytest.mark.parametrize("template", OWN.values(), ids=OWN)
def test_what_one_exchange_cannot_express_goes_over_all_messages(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    assert "{{ range $i, $_ := .Messages }}" in check(tokenizer)


def test_a_default_system_text_is_the_branch_without_system(tokenizer: Any) -> None:
    tokenizer.chat_template = OWN["default before all"]
    assert "{{ if .System }}<system>{{ .System }}{{ else }}<system>Help.{{ end }}" in check(tokenizer)
    assert "{{ else }}<system>Help.{{ end }}" in modelfile(tokenizer, "template", (), "model.gguf")


def test_a_template_of_one_exchange_stays_one(tokenizer: Any) -> None:
    tokenizer.chat_template = TURNS + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    assert "{{ .Prompt }}" in check(tokenizer)


def test_what_concerns_earlier_turns_alone_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + ' ' + (loop.index if not loop.last else 0) | string + '>' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    notes: list[str] = []
    template = ollama_template(tokenizer, "template", notes.append)
    assert ollama(template, [ASK]) == "<user 0>Is it?<assistant>"
    assert any("puts earlier turns in a way that Ollama's cannot" in note for note in notes)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1].role }}", "does not render the question once"),
        ("<u>{{ messages[-1].content }}<a>", "does not keep earlier turns"),
    ],
)
def test_a_template_that_loses_text_is_refused(template: str, message: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=message):
        ollama_template(tokenizer, "template")
