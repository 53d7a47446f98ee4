"""Prompts: a user's question as token ids, in the form in which the training rows put their questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nybble.data.adapt import adapt_to_template
from nybble.data.answers import contains
from nybble.data.contexts import mark_turns, prompt_ids
from nybble.data.messages import render_turns, styles
from nybble.data.rendered import CHAT_FORMATS
from nybble.data.shapes import Turn, alpaca_prompt
from nybble.data.tokens import adds_bos, mark, tokenize
from nybble.errors import RowsError


def encode_prompt(question: str, tokenizer: Any, form: str, system: str = "") -> list[int]:
    """Token ids of a user's question up to where the answer begins, in the prompt form of the training rows.

    In a form that has no place for a system text, `system` precedes the question.
    """
    if form == "template":
        turns = [Turn("system", system)] if system else []
        return encode_chat([*turns, Turn("user", question)], tokenizer)
    if form == "inst" and system:
        question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
    elif system:
        question = f"{system}\n\n{question}"
    # A plain prompt is the whole text, written by someone who knows its form: its control tokens are intended.
    (marked,), sign = mark([question], tokenizer) if form != "plain" else ([question], "")
    return prompt_ids(question_form(form).replace("{}", marked, 1), sign, tokenizer)


def question_form(form: str) -> str:
    """The text around a question in a prompt form other than "template"; {} stands for the question."""
    forms = {name: chat_format.question for name, chat_format in CHAT_FORMATS.items()}
    return {**forms, "inst": "[INST] {} [/INST]", "alpaca": alpaca_prompt("{}")}.get(form, "{}")


def encode_follow_up(question: str, tokenizer: Any, form: str) -> list[int]:
    """Token ids of a later question, which follow an answer and its end token; for any form except "template"."""
    ids = encode_prompt(question, tokenizer, form)
    if form not in CHAT_FORMATS:
        return ids
    # Rendered text has only one begin token, and may have line breaks between its turns.
    chat_format = CHAT_FORMATS[form]
    between = chat_format.question.partition(chat_format.stop)[2].partition("<")[0]
    ids = ids[1:] if adds_bos(tokenizer) else ids
    return [*tokenize(between, tokenizer)[0], *ids] if between else ids


def encode_chat(turns: Sequence[Turn], tokenizer: Any) -> list[int]:
    """Token ids of a chat that ends with a question, as the tokenizer's chat template renders it."""
    template = str(tokenizer.chat_template)
    marked, sign = mark_turns(adapt_to_template(turns, tokenizer, "prompt")[0], tokenizer, template)
    fault = RowsError("prompt: the chat template leaves out the question; set --chat_template to another one")
    for style in styles(marked, template):
        try:
            text = render_turns(marked, tokenizer, "prompt", asks=True, style=style)
        except RowsError as error:
            fault = error
            continue
        if contains(text, marked[-1].content):
            return prompt_ids(text, sign, tokenizer)
    raise fault
