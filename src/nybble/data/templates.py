"""Chat templates for tokenizers that bring none, by name."""

from __future__ import annotations

from pathlib import Path

from nybble.errors import RowsError

# Llama-2's form: the system text goes into the first user turn.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if turn['role'] == 'assistant' %}{{ ' ' + turn['content'] + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ turn['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] }}"
    "{{ eos_token if turn['role'] == 'assistant' else '<|im_end|>' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_NAMED = {"inst": INST, "chatml": CHATML}


def find_template(name: str) -> str:
    """The template called `name`, or the text of the `.jinja` file at `name`.

    Raises:
        RowsError: neither exists.
    """
    if name in _NAMED:
        return _NAMED[name]
    path = Path(name).expanduser()
    if path.suffix == ".jinja" and path.is_file():
        return path.read_text(encoding="utf-8")
    raise RowsError(f"chat_template: got {name!r}; allowed: {', '.join(_NAMED)} or an existing .jinja file")
