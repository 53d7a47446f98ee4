"""Text that is rendered already: each chat format is known by its marks, and no other text is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nybble.data import Prepared, encode_follow_up, encode_prompt
from nybble.data.rendered import CHAT_FORMATS, find_answers, looks_like_turns

Call = Callable[..., Prepared]
END = "<｜end▁of▁sentence｜>"
# Format -> prompt, answer, prompt, answer of a text in it.
TEXTS = {
    "zephyr": (
        "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n",
        "A</s>",
        "\n<|user|>\nR</s>\n<|assistant|>\n",
        "B</s>",
    ),
    "phi3": ("<|user|>\nQ<|end|>\n<|assistant|>\n", "A<|end|>", "\n<|user|>\nR<|end|>\n<|assistant|>\n", "B<|end|>"),
    "deepseek-v3": (
        "S<｜User｜>Q<｜Assistant｜>",
        f"A{END}",
        "<｜User｜>R<｜Assistant｜>",
        f"<think>\n</think>\nB{END}",
    ),
    "deepseek": ("User: Q\n\nAssistant:", f" A, dear User: {END}", "User: R\n\nAssistant:", f" B{END}"),
    "mistral-v1": ("<s>[INST] Q [/INST]", " A</s>", "[INST] R [/INST]", " B</s>"),
    "mistral-v3": ("[INST] Q[/INST]", " A</s>", "[INST] R[/INST]", " B</s>"),
    "mistral-tekken": ("[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q[/INST]", "A</s>", "[INST]R[/INST]", "B</s>"),
    "vicuna": ("A chat. USER: Q ASSISTANT:", " A</s>", "USER: R ASSISTANT:", " B</s>"),
    "human": ("### Human: Q### Assistant:", " A", "### Human: R### Assistant:", " B"),
    "human-lines": ("### Human: Q\n### Assistant:", " A", "\n### Human: R\n### Assistant:", " B"),
}


def without_begin(text: str) -> str:
    return text.removeprefix("<s>")


@pytest.mark.parametrize("form", TEXTS)
def test_the_answers_of_a_format_are_learned(learns: Call, form: str) -> None:
    text = "".join(TEXTS[form])
    prompt, *segments = TEXTS[form]
    # A stop mark that is no token of this tokenizer is followed by its end token.
    learned = [part if part.endswith("</s>") else f"{part}</s>" for part in segments[::2]]
    done = learns({"text": text}, f"<s>{without_begin(prompt)}", learned[0], segments[1], learned[1])
    assert (done.ledger.prompt_form, done.ledger.turns, done.ledger.notes) == (form, 2, {})


@pytest.mark.parametrize("form", TEXTS)
def test_a_question_is_put_as_the_rows_have_it(prepare: Call, tok: Any, form: str) -> None:
    text = "".join(TEXTS[form])
    row = prepare([{"text": text}]).train[0]
    asked = encode_prompt("R", tok, form)
    assert tok.decode(asked).endswith(TEXTS[form][2].lstrip("\n"))
    assert row.prompt_ids[-len(asked) + 1 :] == asked[1:]
    assert encode_follow_up("R", tok, form)[-len(asked) + 1 :] == asked[1:]


@pytest.mark.parametrize("form", [name for name, parts in TEXTS.items() if "S" in parts[0].replace("ASSI", "")])
def test_a_part_of_a_long_text_keeps_the_system_text(prepare: Call, tok: Any, form: str) -> None:
    text = "".join(TEXTS[form])
    whole = prepare([{"text": text}]).train[0]
    parts = prepare([{"text": text}], max_length=len(whole.input_ids) - 1, overlong="split").train
    assert len(parts) == 2
    assert "S" in tok.decode(parts[1].input_ids)


@pytest.mark.parametrize("form", TEXTS)
def test_an_answer_may_be_empty_or_cut_off(form: str) -> None:
    prompt, _answer, later, last = TEXTS[form]
    stop = CHAT_FORMATS[form].stop
    name, spans = find_answers(prompt + stop + later + last.removesuffix(stop))
    text = prompt + stop + later + last.removesuffix(stop)
    assert (name, [text[a:b] for a, b in spans]) == (form, [stop, last.removesuffix(stop)])


@pytest.mark.parametrize(
    "text",
    [
        "<|user|>\nQ<|assistant|>\nA<|user|>\nR<|assistant|>\nB",
        "<|user|>\nQ<|end|>\n<|assistant|>\nA\n<|user|>\nR<|end|>\n<|assistant|>\nB<|end|>",
        "<|im_start|>user\nQ\n<|im_start|>assistant\nA",
        "USER: Q ASSISTANT: A USER: R ASSISTANT: B",
        "User: Q\n\nAssistant: A",
        "**Human**: Q\n**Assistant**: A",
        "Q: why?\nA: because",
        "### Response: a\n### Response: b\n### Instruction: c",
    ],
)
def test_half_of_the_marks_are_no_format_and_this_is_said(learns: Call, text: str) -> None:
    done = learns({"text": text}, "<s>", f"{text}</s>")
    assert done.ledger.prompt_form == "plain"
    assert done.ledger.notes == {"text that looks like turns has no known marks, so all of it is learned": 1}


@pytest.mark.parametrize(
    "text", ["The assistant: a play.", "He asked. She answered: no.", "1 < 2 | 3 > 2", "user = 3\nanswer = 4", "Q.E.D."]
)
def test_prose_does_not_look_like_turns(text: str) -> None:
    assert not looks_like_turns(text)


def test_results_of_mistrals_tools_are_followed_by_an_answer(learns: Call) -> None:
    prompt = "[AVAILABLE_TOOLS] [][/AVAILABLE_TOOLS][INST] Q[/INST]"
    result = "[TOOL_RESULTS] 3[/TOOL_RESULTS]"
    learns(
        {"text": f"{prompt}[TOOL_CALLS] []</s>{result} A</s>"}, f"<s>{prompt}", "[TOOL_CALLS] []</s>", result, " A</s>"
    )


@pytest.mark.parametrize("text", ["<s>[INST] Q[/INST] A</s><s>[INST] R[/INST] B</s>", "<s>[INST] Q [/INST] A </s>"])
def test_llama2s_text_is_not_taken_for_mistrals(prepare: Call, tok: Any, text: str) -> None:
    done = prepare([{"text": text}])
    assert done.ledger.prompt_form == "inst"
    assert tok.decode(done.train[0].input_ids) == text


@pytest.mark.parametrize("line", ["\n", " "])
def test_several_instructions_have_an_answer_each(learns: Call, line: str) -> None:
    first, second = (f"### Instruction:{line}{name}\n\n### Response:{line}" for name in "QR")
    line = line.strip(" ")
    first, second = first.rstrip(" "), second.rstrip(" ")
    lead = "" if line else " "
    learns(
        {"text": f"Do it.\n\n{first}{lead}A\n\n{second}{lead}B"},
        f"<s>Do it.\n\n{first}", f"{lead}A</s>", f"<s>{second}", f"{lead}B</s>",
    )  # fmt: skip
