"""Text that a chat template has already rendered: its marks tell which chat format it has and where answers are."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatFormat:
    """The marks of one chat format."""

    header: str  # begins an answer
    stop: str  # ends an answer
    question: str  # a question, for which {} stands, and the header of its answer
    system: tuple[str, str] = ("", "")  # around a system text


CHAT_FORMATS = {
    "chatml": ChatFormat(
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_start|>system\n", "<|im_end|>\n"),
    ),
    "llama3": ChatFormat(
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    "gemma": ChatFormat(
        "<start_of_turn>model\n", "<end_of_turn>", "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    ),
    "phi3": ChatFormat(
        "<|assistant|>\n", "<|end|>", "<|user|>\n{}<|end|>\n<|assistant|>\n", ("<|system|>\n", "<|end|>\n")
    ),
}


def find_answers(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat format of the text ("" for none) and each answer as a span of characters that includes its stop mark."""
    for name, chat_format in CHAT_FORMATS.items():
        if chat_format.header in text:
            pattern = f"{re.escape(chat_format.header)}(.*?(?:{re.escape(chat_format.stop)}|\\Z))"
            return name, [match.span(1) for match in re.finditer(pattern, text, re.DOTALL)]
    return "", []


def with_system(prompt: str, first: str, form: str) -> str:
    """A later prompt of a text, with the system text that only the text's `first` prompt has; `form` is both's form."""
    if form == "inst":
        begin, end = ("<<SYS>>", "<</SYS>>")
    else:
        begin, end = CHAT_FORMATS[form].system if form in CHAT_FORMATS else ("", "")
    # This does not use a regular expression: its time would grow with the square of the text's length.
    start = first.find(begin) if begin else -1
    stop = first.find(end, start + len(begin)) if start >= 0 else -1
    system = first[start : stop + len(end)] if stop >= 0 else ""
    if form == "inst" and system:
        rest = first[stop + len(end) :]
        system += rest[: len(rest) - len(rest.lstrip())]
    if form == "inst":
        return re.sub(r"\[INST\] ?", lambda _: f"[INST] {system}", prompt, count=1)
    return system + prompt.lstrip() if form in CHAT_FORMATS else prompt


def without_stop(answer: str, form: str) -> str:
    """The answer without the stop mark of its chat format, if `form` is a chat format."""
    return answer.removesuffix(CHAT_FORMATS[form].stop) if form in CHAT_FORMATS else answer
