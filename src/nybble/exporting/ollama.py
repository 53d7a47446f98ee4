"""Writes a Modelfile for Ollama: the model's file, the chat template, and the tokens that end an answer.

Ollama's templates are written in Go's language, not in Jinja. The texts around system text, question and answer are
found by rendering the tokenizer's own template with markers in their places. A template that puts every exchange alike
becomes that of one exchange, which Ollama repeats. Any other (a default system text, which stands once, or answers that
read differently afterwards) becomes one that goes over all messages. What that cannot express concerns earlier turns
alone, and is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nybble.data import question_form, render_chat
from nybble.errors import ModelError, RowsError

_SYSTEM, _USER, _ANSWER = "\ue001", "\ue002", "\ue003"  # private-use characters, which templates leave unchanged
_QUESTION, _REPLY = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
_Render = Callable[[list[dict[str, str]], bool], str]


def modelfile(
    tokenizer: Any,
    form: str,
    stop_tokens: Sequence[int],
    gguf_name: str,
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """The text of the Modelfile for a model whose prompts have `form`; `note` is told what it cannot express.

    Raises:
        ModelError: the chat template cannot be expressed in Ollama's language.
    """
    template = ollama_template(tokenizer, form, note)
    stops = [tokenizer.convert_ids_to_tokens(token) for token in dict.fromkeys([*stop_tokens, tokenizer.eos_token_id])]
    # The template is untrusted text: if it ended the quotes, the rest would be read as lines of the Modelfile.
    if '"""' in template or template.endswith('"') or any('"' in stop or "\n" in stop for stop in stops):
        raise ModelError(
            "the chat template or an end token has quotes, which a Modelfile cannot have; write it by hand"
        )
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def ollama_template(tokenizer: Any, form: str, note: Callable[[str], None] = lambda text: None) -> str:
    """The chat template in Go's language; Ollama adds the begin token itself.

    Raises:
        ModelError: the chat template does not keep a question as it is.
    """
    if form != "template":
        before, after = question_form(form).split("{}")
        end = tokenizer.eos_token if form in ("inst", "plain", "alpaca") else ""
        system = "{{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}" if form == "inst" else ""
        lead = "" if system else "{{ if .System }}{{ .System }}\n\n{{ end }}"
        return f"{before}{system}{lead}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
    bos = tokenizer.bos_token or ""

    def render(messages: list[dict[str, str]], asks: bool) -> str:
        return render_chat(tokenizer, messages, "Modelfile", asks=asks)

    asked = render([_QUESTION], True)
    if asked.count(_USER) != 1:
        raise ModelError("the chat template does not render the question once and unchanged; write a Modelfile by hand")
    try:
        told = render([{"role": "system", "content": _SYSTEM}, _QUESTION], True)
    except RowsError:
        told = ""
    before, after = asked.removeprefix(bos).split(_USER)
    told = told.removeprefix(bos)
    if told.count(_SYSTEM) != 1 or not told.endswith(_USER + after):
        note("the chat template takes no system text before a question, so Ollama's is left out")
        told = ""
    repeated = _one_exchange(render, bos, (before, after), told)
    return repeated if repeated is not None else _all_messages(render, bos, (before, after), told, note)


def _one_exchange(render: _Render, bos: str, around: tuple[str, str], told: str) -> str | None:
    """The template of one exchange, which Ollama repeats for each; None where the second is not put as the first."""
    before, after = around
    asked, answered = render([_QUESTION], True), render([_QUESTION, _REPLY], False)
    # The text between two exchanges is what the second one adds.
    second = render([_QUESTION, _REPLY, _QUESTION, _REPLY], False)
    between = bos if bos and second.startswith(bos, len(answered)) else ""
    if not answered.startswith(asked) or second != answered + between + answered.removeprefix(bos):
        return None
    end = answered[len(asked) :].partition(_ANSWER)[2].lstrip(" ")  # spaces around an answer belong to the answer
    system = ""
    if told:
        lead, rest = told.removesuffix(_USER + after).split(_SYSTEM)
        if lead.startswith(before):  # the system text is part of the question
            return (
                f"{before}{{{{ if .System }}}}{lead.removeprefix(before)}{{{{ .System }}}}{rest}{{{{ end }}}}"
                f"{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
            )
        system = f"{{{{ if .System }}}}{lead}{{{{ .System }}}}{rest.removesuffix(before)}{{{{ end }}}}"
    return f"{system}{before}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"


def _all_messages(render: _Render, bos: str, around: tuple[str, str], told: str, note: Callable[[str], None]) -> str:
    """The template of a whole chat: what stands before it, once, and each message by its role."""
    later = render([_QUESTION, _REPLY, _QUESTION], True).removeprefix(bos)
    if (later.count(_USER), later.count(_ANSWER)) != (2, 1):
        raise ModelError("the chat template does not keep earlier turns; write a Modelfile by hand")
    first, rest_of_chat = later.split(_USER, 1)
    to_answer, rest_of_chat = rest_of_chat.split(_ANSWER)
    to_question, after = rest_of_chat.split(_USER)
    start, before, end = _parted(around[0], to_question, render([_QUESTION, _REPLY], False).partition(_ANSWER)[2])
    exchange = f"{_USER}{to_answer}{_ANSWER}{to_question}"
    third = render([_QUESTION, _REPLY, _QUESTION, _REPLY, _QUESTION], True).removeprefix(bos)
    if (first, after) != around or third != f"{first}{exchange}{exchange}{_USER}{after}":
        note("the chat template puts earlier turns in a way that Ollama's cannot; a first question is put alike")
    system = start
    if told:
        lead, rest = told.removesuffix(_USER + around[1]).split(_SYSTEM)
        if not rest.endswith(before):
            note("the chat template puts a system text into the question, so Ollama's is left out")
        else:
            default = f"{{{{ else }}}}{start}" if start else ""
            system = f"{{{{ if .System }}}}{lead}{{{{ .System }}}}{rest.removesuffix(before)}{default}{{{{ end }}}}"
    return (
        f"{system}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
        f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{{{{ if $last }}}}{around[1]}{{{{ end }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{to_answer}{{{{ .Content }}}}{{{{ if not $last }}}}{end}{{{{ end }}}}'
        "{{ end }}{{ end }}"
    )


def _parted(first: str, between: str, end: str) -> tuple[str, str, str]:
    """What stands before a chat, before a question and behind an answer, where `between` is the last two in turn.

    `first` ends with what stands before a question; `end` is behind an answer that nothing follows.
    """
    before = between.removeprefix(end)
    if not between.startswith(end) or not first.endswith(before):
        size = next(n for n in range(len(between) + 1) if first.endswith(between[n:]))
        before = between[size:]
    return first.removesuffix(before), before, between.removesuffix(before)
