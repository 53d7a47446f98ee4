"""Text that a chat template rendered already: its family is known by its marks, and they say where answers are."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Marks around an answer, how a question is put so that one follows, and the marks around a system text."""

    header: str
    stop: str
    question: str
    system: tuple[str, str] = ("", "")


FAMILIES = {
    "chatml": Family(
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_start|>system\n", "<|im_end|>\n"),
    ),
    "llama3": Family(
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    "gemma": Family(
        "<start_of_turn>model\n", "<end_of_turn>", "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    ),
    "phi3": Family("<|assistant|>\n", "<|end|>", "<|user|>\n{}<|end|>\n<|assistant|>\n", ("<|system|>\n", "<|end|>\n")),
}


def find_answers(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The family whose marks the text has, "" for none, and the characters of each answer, its stop mark included."""
    for name, family in FAMILIES.items():
        if family.header in text:
            pattern = f"{re.escape(family.header)}(.*?(?:{re.escape(family.stop)}|\\Z))"
            return name, [match.span(1) for match in re.finditer(pattern, text, re.DOTALL)]
    return "", []


def with_system(prompt: str, first: str, family: str) -> str:
    """A later prompt of a text, begun as its first: with the system text, which stands before that one alone."""
    begin, end = (
        ("<<SYS>>", "<</SYS>>") if family == "inst" else FAMILIES[family].system if family in FAMILIES else ("", "")
    )
    # Not by a regular expression: one that may end anywhere takes the square of a long text's time.
    start = first.find(begin) if begin else -1
    stop = first.find(end, start + len(begin)) if start >= 0 else -1
    system = first[start : stop + len(end)] if stop >= 0 else ""
    if family == "inst" and system:
        rest = first[stop + len(end) :]
        system += rest[: len(rest) - len(rest.lstrip())]
    if family == "inst":
        return re.sub(r"\[INST\] ?", lambda _: f"[INST] {system}", prompt, count=1)
    return system + prompt.lstrip() if family in FAMILIES else prompt


def without_stop(answer: str, family: str) -> str:
    """The answer alone."""
    return answer.removesuffix(FAMILIES[family].stop) if family in FAMILIES else answer
