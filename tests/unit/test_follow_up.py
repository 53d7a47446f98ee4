"""A chat's later questions are put as rows with several turns have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.data import encode_follow_up, encode_prompt, prepare_rows
from nybble.data.rendered import CHAT_FORMATS
from nybble.recipe import DataSection, EvaluationSection


@pytest.mark.parametrize("form", ["inst", "chatml", "llama3", "gemma", "phi3"])
def test_a_second_question_has_the_tokens_of_rows_with_two_turns(
    form: str, byte_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    if form == "inst":
        text = "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"
    else:
        chat_format = CHAT_FORMATS[form]
        marks = [chat_format.stop, *(part for part in chat_format.header.split("\n") if part.startswith("<"))]
        tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(marks))})
        between = chat_format.question.partition(chat_format.stop)[2].partition("<")[0]
        text = between.join(
            f"{chat_format.question.format(q)}{a}{chat_format.stop}" for q, a in (("a", "b"), ("c", "d"))
        )
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    data = DataSection(dataset_name=str(file), eval_fraction=0)
    (row,) = prepare_rows(data, EvaluationSection(), tokenizer, 0).train
    assert row.prompt_ids[: len(encode_prompt("a", tokenizer, form))] == encode_prompt("a", tokenizer, form)
    later = encode_follow_up("c", tokenizer, form)
    assert row.prompt_ids[-len(later) :] == later
