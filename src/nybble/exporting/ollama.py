"""Writes a Modelfile for Ollama: the model's file, the chat template, and the tokens that end an answer.

Ollama's templates are written in Go's language, not in Jinja. The texts around system text, question and answer are
found by rendering the tokenizer's own template with markers in their places. The result is then checked: it must render
a chat of two turns as the tokenizer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nybble.data import question_form, render_chat
from nybble.errors import ModelError, RowsError

_SYSTEM, _USER, _ANSWER = "\ue001", "\ue002", "\ue003"  # private-use characters, which templates leave unchanged
_Render = Callable[[list[dict[str, str]], bool], str]


def modelfile(tokenizer: Any, form: str, stop_tokens: Sequence[int], gguf_name: str) -> str:
    """The text of the Modelfile for a model whose prompts have `form`.

    Raises:
        ModelError: the chat template cannot be expressed in Ollama's language.
    """
    template = ollama_template(tokenizer, form)
    stops = [tokenizer.convert_ids_to_tokens(token) for token in dict.fromkeys([*stop_tokens, tokenizer.eos_token_id])]
    # The template is untrusted text: if it ended the quotes, the rest would be read as lines of the Modelfile.
    if '"""' in template or template.endswith('"') or any('"' in stop or "\n" in stop for stop in stops):
        raise ModelError(
            "the chat template or an end token has quotes, which a Modelfile cannot have; write it by hand"
        )
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def ollama_template(tokenizer: Any, form: str) -> str:
    """The template of one exchange in Go's language. Ollama repeats it for each, and adds the begin token itself."""
    if form != "template":
        before, after = question_form(form).split("{}")
        end = tokenizer.eos_token if form in ("inst", "plain", "alpaca") else ""
        system = "{{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}" if form == "inst" else ""
        lead = "" if system else "{{ if .System }}{{ .System }}\n\n{{ end }}"
        return f"{before}{system}{lead}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
    return _translated(tokenizer)


def _translated(tokenizer: Any) -> str:
    def render(messages: list[dict[str, str]], asks: bool) -> str:
        return render_chat(tokenizer, messages, "Modelfile", asks=asks)

    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    bos = tokenizer.bos_token or ""
    asked, answered = render([user], True), render([user, answer], False)
    if asked.count(_USER) != 1:
        raise ModelError("the chat template does not render the question once and unchanged; write a Modelfile by hand")
    before, after = asked.removeprefix(bos).split(_USER)
    if not answered.startswith(asked):
        raise ModelError("the chat template renders an answered question differently; write a Modelfile by hand")
    end = answered[len(asked) :].partition(_ANSWER)[2].lstrip(" ")  # spaces around an answer belong to the answer
    # The text between two exchanges is what the second one adds.
    second = render([user, answer, user, answer], False)
    between = bos if bos and second.startswith(bos, len(answered)) else ""
    if second != answered + between + answered.removeprefix(bos):
        raise ModelError("the chat template renders a second exchange differently; write a Modelfile by hand")
    try:
        told = render([{"role": "system", "content": _SYSTEM}, user], True).removeprefix(bos)
    except RowsError:
        told = ""
    system = ""
    if told.count(_SYSTEM) == 1 and told.endswith(_USER + after):
        lead, rest = told.removesuffix(_USER + after).split(_SYSTEM)
        if lead.startswith(before):  # the system text is part of the question
            return (
                f"{before}{{{{ if .System }}}}{lead.removeprefix(before)}{{{{ .System }}}}{rest}{{{{ end }}}}"
                f"{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
            )
        system = f"{{{{ if .System }}}}{lead}{{{{ .System }}}}{rest.removesuffix(before)}{{{{ end }}}}"
    return f"{system}{before}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
