"""Text that a chat template has already rendered: its marks tell which chat format it has and where answers are.

A format is recognised by the mark that begins an answer together with the mark that ends it, because formats share the
one or the other: `<|assistant|>` begins an answer of Phi-3, of Zephyr and of others that never end it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatFormat:
    """The marks of one chat format."""

    header: str  # begins an answer
    stop: str  # ends an answer
    question: str  # a question, for which {} stands, and the header of its answer
    system: tuple[str, str] = ("", "")  # around a system text; without these, it is what precedes the first question
    needs_stop: bool = True  # whether text is of this format only if it has the stop mark
    result: str = ""  # also begins an answer: the mark behind the results of tools

    @property
    def opening(self) -> str:
        """The mark that begins a question."""
        return self.question.partition("{}")[0].rstrip(" ")


_SYSTEM_PROMPT = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_SENTENCE_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # DeepSeek's end token, with a wide bar and a low block

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
    "zephyr": ChatFormat("<|assistant|>\n", "</s>", "<|user|>\n{}</s>\n<|assistant|>\n", ("<|system|>\n", "</s>\n")),
    "deepseek-v3": ChatFormat("<\uff5cAssistant\uff5c>", _SENTENCE_END, "<\uff5cUser\uff5c>{}<\uff5cAssistant\uff5c>"),
    "deepseek": ChatFormat("Assistant:", _SENTENCE_END, "User: {}\n\nAssistant:"),
    # Mistral's formats differ in their spaces; v7 is v3 with marks around the system text.
    "mistral-v1": ChatFormat("[/INST]", "</s>", "[INST] {} [/INST]"),
    "mistral-v3": ChatFormat("[/INST]", "</s>", "[INST] {}[/INST]", _SYSTEM_PROMPT, result="[/TOOL_RESULTS]"),
    "mistral-tekken": ChatFormat("[/INST]", "</s>", "[INST]{}[/INST]", _SYSTEM_PROMPT, result="[/TOOL_RESULTS]"),
    "vicuna": ChatFormat("ASSISTANT:", "</s>", "USER: {} ASSISTANT:"),
    "human": ChatFormat("### Assistant:", "</s>", "### Human: {}### Assistant:", needs_stop=False),
    "human-lines": ChatFormat("### Assistant:", "</s>", "### Human: {}\n### Assistant:", needs_stop=False),
}
# Marks of formats that are not known here, and names of speakers at the beginning of a line; all in lower case.
_UNKNOWN_MARK = re.compile(r"<\|[a-z_]+\|>|<\uff5c\w+\uff5c>|<start_of_turn>|\[inst\]|</?(?:user|assistant)>")
_ASKS = re.compile(r"\n[ \t#*]*(?:user|human|instruction|question|q)\**:")
_ANSWERS = re.compile(r"\n[ \t#*]*(?:assistant|ai|bot|response|answer|a)\**:")
_SEARCHED_CHARACTERS = 20_000


def find_answers(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat format of the text ("" for none) and each answer as a span of characters that includes its stop mark."""
    mistral = _mistral_of(text) if "[/INST]" in text else ""
    for name, chat_format in CHAT_FORMATS.items():
        if chat_format.header not in text or (chat_format.header == "[/INST]" and name != mistral):
            continue
        if name == "human" and "\n### Assistant:" in text:
            continue
        answers = find_spans(text, chat_format)
        if answers:
            return name, answers
    return "", []


def _mistral_of(text: str) -> str:
    """Which of Mistral's formats a text with [INST] has; "" for Llama 2's, which begins every question with <s>."""
    if "</s>" not in text or re.search(r"</s>\s*<s>\s*\[INST\]", text):
        return ""
    if "[SYSTEM_PROMPT]" in text or not text.partition("[/INST]")[0][-1:].isspace():
        return "mistral-v3" if "[INST] " in text else "mistral-tekken"
    return "mistral-v1" if re.search(r"</s>\s*\[INST\]", text) and text.lstrip().startswith("<s>") else ""


def find_spans(text: str, chat_format: ChatFormat) -> list[tuple[int, int]]:
    """The answers of a text in this format as spans of characters, with their stop marks; none if it is in another.

    An answer ends with its stop mark; only the last may lack it. In formats without one it ends before the next
    question.
    """
    has_marks = not chat_format.opening[0].isalpha()
    if chat_format.needs_stop and chat_format.stop not in text:
        return []
    if not has_marks and chat_format.opening not in text:
        return []
    # What an answer cannot hold. A word such as "User:" may occur in one, so there it is the next answer's header.
    border = chat_format.opening if has_marks else chat_format.header
    headers = re.compile("|".join(re.escape(mark) for mark in (chat_format.header, chat_format.result) if mark))
    spans: list[tuple[int, int]] = []
    end = 0
    while header := headers.search(text, end):
        start = header.end()
        next_turn = text.find(border, start)
        last = next_turn if next_turn >= 0 else len(text)
        stop = text.find(chat_format.stop, start, last)
        if stop >= 0:
            end = stop + len(chat_format.stop)
        elif not chat_format.needs_stop:
            end = start + len(text[start:last].rstrip())
        elif next_turn >= 0:
            return []
        else:
            end = len(text)
        spans.append((start, end))
    return spans


def looks_like_turns(text: str) -> bool:
    """Whether text without known marks seems to be a conversation all the same."""
    begin = text[:_SEARCHED_CHARACTERS]
    lines = f"\n{begin.lower()}"
    has_mark = ("<" in begin or "[" in begin) and _UNKNOWN_MARK.search(lines) is not None
    has_speakers = "USER:" in begin and "ASSISTANT:" in begin
    return has_mark or has_speakers or (_ASKS.search(lines) is not None and _ANSWERS.search(lines) is not None)


def with_system(prompt: str, first: str, form: str) -> str:
    """A later prompt of a text, with the system text that only the text's `first` prompt has; `form` is both's form."""
    if form == "inst":
        begin, end = ("<<SYS>>", "<</SYS>>")
    else:
        begin, end = CHAT_FORMATS[form].system if form in CHAT_FORMATS else ("", "")
    if form in CHAT_FORMATS and not begin:
        before = first.partition(CHAT_FORMATS[form].opening)[0]
        return before + prompt.lstrip() if before.strip() else prompt
    # This does not use a regular expression: its time would grow with the square of the text's length.
    start = first.find(begin) if begin else -1
    stop = first.find(end, start + len(begin)) if start >= 0 else -1
    system = first[start : stop + len(end)] if stop >= 0 else ""
    if form == "inst" and system:
        rest = first[stop + len(end) :]
        system += rest[: len(rest) - len(rest.lstrip())]
    if form == "inst":
        return re.sub(r"\[INST\] ?", lambda _: f"[INST] {system}", prompt, count=1)
    return system + (prompt.lstrip() if system else prompt) if form in CHAT_FORMATS else prompt


def without_stop(answer: str, form: str) -> str:
    """The answer without the stop mark of its chat format, if `form` is a chat format."""
    return answer.removesuffix(CHAT_FORMATS[form].stop) if form in CHAT_FORMATS else answer
