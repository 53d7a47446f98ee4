"""Which tokens are learned, token by token.

The byte-level tokenizer makes the oracle simple: each token is some bytes, so what must be learned can be written down
as text and compared without asking how the code under test finds it (`learns`, in conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nybble.data import IGNORED, Example, Groups, PadBatch, Prepared, encode_prompt, prepare_rows, read_rows
from nybble.errors import InputError, RowsError
from nybble.recipe import DataSection, EvaluationSection

Call = Callable[..., Prepared]
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Is the sky blue?"}
ANSWER = {"role": "assistant", "content": "Yes, it is."}
TURNS = [QUESTION, ANSWER, {"role": "user", "content": "Always?"}, {"role": "assistant", "content": "No."}]
SHAREGPT = [("system", "S"), ("human", "Q"), ("gpt", "A"), ("observation", "R"), ("function_call", "B")]
START, END, NEXT = "<|im_start|>", "<|im_end|>\n", "<|im_start|>assistant\n"
NUMBERED = [{"text": f"<s>[INST] {i} [/INST] {i} </s>"} for i in range(40)]


def learned_text(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([i for i in example.labels if i != IGNORED]))


@pytest.mark.parametrize("end", [" </s>", "</s>", " \n</s>"])
def test_inst_text_learns_the_answer_and_its_end(learns: Call, end: str) -> None:
    text = "<s>[INST] Is the sky blue? [/INST] Yes, it is."
    done = learns({"text": text + end}, "<s>[INST] Is the sky blue? [/INST]", " Yes, it is." + end)
    assert (done.ledger.shape, done.ledger.prompt_form) == ("text", "inst")
    assert done.ledger.tokens_trained == done.train[0].n_trained


@pytest.mark.parametrize("between", ["", " ", "\n"])
def test_inst_text_of_many_turns_learns_each_answer(learns: Call, tok: Any, between: str) -> None:
    first, second = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]", "<s>[INST] R [/INST]"
    done = learns({"text": f"{first} A </s>{between}{second} B</s>"}, first, " A </s>", second, " B</s>")
    assert done.train[0].input_ids.count(tok.bos_token_id) == 2
    assert (done.train[0].n_answers, done.train[0].n_stops) == (2, 2)


def test_inst_text_without_marks_of_begin_and_end_gets_them(learns: Call) -> None:
    learns({"text": "[INST] Q [/INST] A"}, "<s>[INST] Q [/INST]", " A</s>")


def test_plain_text_is_learned_whole(learns: Call) -> None:
    done = learns({"story": "The sky is blue.\n", "more": 1}, "<s>", "The sky is blue.</s>", dataset_text_field="story")
    assert done.ledger.prompt_form == "plain"


def test_prompt_and_completion(learns: Call) -> None:
    row = {"prompt": "Is the sky blue?\n", "completion": "Yes, it is."}
    assert learns(row, "<s>Is the sky blue?\n", "Yes, it is.</s>").ledger.shape == "prompt_completion"


def test_prompt_and_completion_as_turns(learns: Call) -> None:
    row = {"prompt": [QUESTION], "completion": [ANSWER]}
    learns(row, "<s>[INST] Is the sky blue? [/INST]", " Yes, it is. </s>", chat_template="inst")


@pytest.mark.parametrize(("extra", "shown"), [("", ""), (None, ""), ("J", "### Input:\nJ\n\n")])
def test_alpaca_in_its_plain_form(learns: Call, extra: str | None, shown: str) -> None:
    row = {"instruction": "I", "input": extra, "output": "O"}
    learns(row, f"<s>### Instruction:\nI\n\n{shown}### Response:\n", "O</s>")


def test_alpaca_through_a_template(learns: Call) -> None:
    row = {"instruction": "I", "input": "J", "output": "O"}
    learns(row, "<s>[INST] I\n\nJ [/INST]", " O </s>", chat_template="inst")


def test_sharegpt(learns: Call) -> None:
    row = {"conversations": [{"from": who, "value": text} for who, text in SHAREGPT]}
    first = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"
    learns(row, first, " A </s>", "<s>[INST] R [/INST]", " B </s>", chat_template="inst")


def test_messages_with_system_through_inst(learns: Call) -> None:
    first = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs the sky blue? [/INST]"
    segments = (first, " Yes, it is. </s>", "<s>[INST] Always? [/INST]", " No. </s>")
    learns({"messages": [SYSTEM, *TURNS]}, *segments, chat_template="inst")


def test_messages_with_system_through_chatml(learns: Call) -> None:
    first = f"<s>{START}system\nBe brief.{END}{START}user\nIs the sky blue?{END}{NEXT}"
    segments = (first, "Yes, it is.</s>", f"\n{START}user\nAlways?{END}{NEXT}", "No.</s>", "\n")
    learns({"messages": [SYSTEM, *TURNS]}, *segments, chat_template="chatml")


def test_a_content_may_be_a_list_of_text_parts(prepare: Call) -> None:
    parts = [{"type": "text", "text": "Is the "}, {"type": "text", "text": "sky blue?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": ["Yes, ", "it is."]}]}
    assert list(prepare([row], chat_template="inst").train) == list(
        prepare([{"messages": TURNS[:2]}], chat_template="inst").train
    )


def test_a_question_left_open_at_the_end_is_not_learned(prepare: Call, tok: Any) -> None:
    example = prepare([{"messages": TURNS[:3]}], chat_template="inst").train[0]
    assert learned_text(example, tok) == " Yes, it is. </s>"
    assert tok.decode(example.prompt_ids) == "<s>[INST] Is the sky blue? [/INST]"


def test_a_template_file_without_end_token_gets_one_at_the_end(learns: Call, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    segments = ("<s>user: Is the sky blue?\n", "assistant: Yes, it is.\n</s>")
    learns({"messages": [QUESTION, ANSWER]}, *segments, chat_template=str(file))


@pytest.mark.parametrize("template", ["inst", "chatml"])
@pytest.mark.parametrize("row", [{"messages": [SYSTEM, *TURNS]}, NUMBERED[0]], ids=["turns", "text"])
def test_loss_on_all_learns_every_token(prepare: Call, row: dict[str, Any], template: str) -> None:
    example = prepare([row], chat_template=template, loss_on="all").train[0]
    assert example.labels == example.input_ids
    assert example.n_trained == len(example.input_ids) - 1


@pytest.mark.parametrize(
    "text",
    ["é ü ß", "👩‍👩‍👧 🇩🇪 x", "a\r\nb\r\n", "שלום עולם", "مرحبا\u200f!", "  two  ", "\ttab", "汉字。", "x\u2028y\x85z"],
    ids=ascii,
)
def test_any_script_keeps_its_borders(learns: Call, text: str) -> None:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    learns(row, f"<s>[INST] {text} [/INST]", f" {text} </s>", chat_template="inst")
    learns({"prompt": text + "\n", "completion": f"A{text}"}, f"<s>{text}\n", f"A{text}</s>")


CONTENT = st.text(min_size=1, max_size=12).filter(lambda text: not {"<", ">", "["} & set(text))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), template=st.sampled_from(["inst", "chatml"])
)
def test_any_conversation_is_learned_exactly(learns: Call, pairs: list[tuple[str, str]], template: str) -> None:
    turns, segments = [], []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if template == "inst":
            segments += [f"<s>[INST] {question} [/INST]", f" {answer} </s>"]
        else:
            begin = "\n" if segments else "<s>"
            segments += [f"{begin}{START}user\n{question}{END}{NEXT}", f"{answer}</s>"]
    rest = ["\n"] if template == "chatml" else []
    learns({"messages": turns}, *segments, *rest, chat_template=template)


@pytest.mark.parametrize(
    ("row", "template", "form"),
    [
        ({"messages": [QUESTION, ANSWER]}, "inst", "template"),
        ({"messages": [QUESTION, ANSWER]}, "chatml", "template"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "chatml", "template"),
        ({"instruction": "Is the sky blue?", "output": "Yes"}, "inst", "template"),
        ({"instruction": "Is the sky blue?", "output": "Yes"}, None, "alpaca"),
        ({"text": "<s>[INST] Is the sky blue? [/INST] Yes </s>"}, None, "inst"),
        ({"prompt": "Is the sky blue?", "completion": " Yes"}, None, "plain"),
    ],
)
def test_a_question_is_put_as_in_training(
    prepare: Call, tok: Any, row: dict[str, Any], template: str | None, form: str
) -> None:
    done = prepare([row], chat_template=template)
    assert done.ledger.prompt_form == form
    assert encode_prompt("Is the sky blue?", tok, form) == done.train[0].prompt_ids


def test_without_a_begin_token_none_is_added(learns: Call, tok: Any) -> None:
    tok.backend_tokenizer.post_processor = processors.ByteLevel()
    learns({"text": "<s>[INST] Q [/INST] A</s>"}, "[INST] Q [/INST]", " A</s>")


def test_padding_is_never_a_label_though_it_is_the_end_token(prepare: Call, tok: Any) -> None:
    done = prepare([{"text": "<s>[INST] Q [/INST] A </s>"}, {"text": "<s>[INST] Q [/INST] " + "A " * 9 + "</s>"}])
    batch = PadBatch(tok.eos_token_id)(Groups(done.train))
    width = max(len(e.input_ids) for e in done.train)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert all(tensor.shape == (2, width) and tensor.dtype == torch.int64 for tensor in batch.values())
    for row, example in enumerate(done.train):
        length, rest = len(example.input_ids), width - len(example.input_ids)
        assert batch["input_ids"][row].tolist() == example.input_ids + [tok.eos_token_id] * rest
        assert batch["labels"][row].tolist() == example.labels + [IGNORED] * rest
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * rest
        assert batch["labels"][row][length - 1] == tok.eos_token_id


def test_a_cut_row_loses_its_end_token_and_is_counted(prepare: Call, tok: Any) -> None:
    rows = [{"text": "<s>[INST] Q [/INST] A </s>"}, {"text": "<s>[INST] Q [/INST] " + "A " * 40 + "</s>"}]
    done = prepare(rows, max_length=30)
    whole, cut = done.train
    assert (whole.is_truncated, cut.is_truncated) == (False, True)
    assert learned_text(whole, tok) == " A </s>"
    assert learned_text(cut, tok) == tok.decode(cut.input_ids)[len("<s>[INST] Q [/INST]") :]
    ledger = done.ledger
    assert (ledger.rows_truncated, ledger.stop_token_trained_fraction, ledger.stop_tokens_cut) == (1, 0.5, 1)
    assert (ledger.rows_over_max_length, ledger.length_p50, ledger.length_max) == (1, len(whole.input_ids), 99)
    assert ledger.tokens_total == len(whole.input_ids) + 30


def test_rows_with_nothing_to_learn_are_dropped_and_counted(prepare: Call) -> None:
    rows = [{"text": "<s>[INST] " + "Q " * 40 + "[/INST] A </s>"}, {"text": ""}, NUMBERED[0]]
    ledger = prepare(rows, max_length=30).ledger
    assert (ledger.rows_read, ledger.rows_used, ledger.rows_dropped, ledger.rows_truncated) == (3, 1, 2, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<s>[INST] Q [/INST] " + "A " * 40 + "</s>", "no answer keeps its end token within max_length 30"),
        ("<s>[INST] " + "Q " * 40 + " [/INST] A </s>", "none of the 2 rows has a token to learn within max_length 30"),
    ],
)
def test_rows_that_are_all_cut_short_are_refused(prepare: Call, text: str, said: str) -> None:
    with pytest.raises(RowsError, match=said):
        prepare([{"text": text}, {"text": text}], max_length=30)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}, {"txt": "b"}], "row 2: column 'text' is missing; the row has txt"),
        ([{"text": "a"}, {}], "row 2: column 'text' is missing; the row has none"),
        ([{"text": "a"}, {"messages": TURNS}], "row 2: column 'text' is missing; the row has messages"),
        ([{"text": "a"}, {"text": ["a"]}], "row 2: column 'text' is of type list, not text"),
        ([{"text": "a"}, {"text": None}], "row 2: column 'text' is of type NoneType, not text"),
        ([{"prompt": "a", "completion": 4}], "row 1: column 'completion' is of type int, not text"),
        ([{"prompt": [], "completion": "x"}], "row 1: column 'completion' holds 'x', not a list of turns"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a"}], "row 2: column 'output' is missing"),
        ([{"messages": TURNS}, {"messages": "hi"}], "row 2: column 'messages' holds 'hi', not a list of turns"),
        ([{"messages": TURNS}, {"messages": []}], "row 2: column 'messages' holds \\[\\], not a list of turns"),
        ([{"messages": [{"role": "bard", "content": "x"}]}], "row 1 turn 1: unknown role 'bard'; allowed: system"),
        ([{"messages": [ANSWER, {"role": "user"}]}], "row 1 turn 2: needs 'role' and 'content'"),
        ([{"messages": [ANSWER, "x"]}], "row 1 turn 2: needs 'role' and 'content', got 'x'"),
        (
            [{"messages": [{"role": "assistant", "content": None}]}],
            "row 1 turn 1: content is of type NoneType, not text",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
            r"row 1 turn 1: a part of the content is 'image'; only text is learned, so leave .* \(--on_bad_row skip\)",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}],
            "row 1 turn 1: a part of the content is 'input_audio'; only text is learned",
        ),
        (
            [{"messages": [{"role": "user", "content": [3]}]}],
            "row 1 turn 1: a part of the content is 'int'; allowed is only {'type'",
        ),
        ([{"messages": TURNS}, {"messages": [QUESTION]}], "row 2: has no assistant turn, so there is nothing to learn"),
        ([{"conversations": [{"from": "human", "value": "x"}]}], "row 1: has no assistant turn"),
        ([{"question": "a", "reply": "b"}], "row 1: has the columns question, reply; allowed: text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(prepare: Call, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(RowsError, match=f"rows.jsonl {said}") as caught:
        prepare(rows, chat_template="inst")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_turns_without_a_template_are_refused(prepare: Call) -> None:
    with pytest.raises(RowsError, match="need a chat template and this tokenizer has none; set --chat_template inst"):
        prepare([{"messages": TURNS}])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "chat_template: got '.*own.jinja'; allowed: inst, chatml or an existing .jinja file"),
        ("{{ raise_exception('no system, please') }}", "row 1: the chat template failed: no system, please"),
        ("{{ messages | length }}{{ messages[-1].content }}", "row 1: the chat template does not write the answer"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(
    prepare: Call, tmp_path: Path, template: str | None, said: str
) -> None:
    if template is not None:
        (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(RowsError, match=said):
        prepare([{"messages": TURNS}], chat_template=str(tmp_path / "own.jinja"))


def test_guanaco_in_llama2s_tokens_is_the_tokenizers_own_encoding(shared_data: Path) -> None:
    name = str(shared_data / "rows" / "guanaco-llama2-1k.parquet")
    llama2 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama2")
    data = DataSection(dataset_name=name, max_length=100_000, eval_fraction=0)
    done = prepare_rows(data, EvaluationSection(), llama2, 0)
    ledger = done.ledger
    assert (ledger.rows_used, ledger.tokens_total, ledger.length_max) == (1000, 461_907, 7832)
    assert ledger.stop_token_trained_fraction == 1.0
    texts = [row["text"] for _, row in read_rows(name)]
    assert [e.input_ids for e in done.train] == llama2(texts, add_special_tokens=False)["input_ids"]


def test_llama2s_answers_are_learned_without_their_prompts(shared_data: Path, prepare: Call) -> None:
    llama2 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama2")
    example = prepare([{"messages": TURNS}], tokenizer=llama2, chat_template="inst").train[0]
    assert learned_text(example, llama2) == "Yes, it is. </s> No. </s>"
    example = prepare([{"prompt": "Blue? Answer: ", "completion": "yes it is"}], tokenizer=llama2).train[0]
    assert learned_text(example, llama2) == "yes it is</s>"  # its first token begins with the prompt's last space
    assert llama2.decode(example.prompt_ids) == "<s> Blue? Answer:"


def test_an_answer_whose_first_token_begins_in_the_prompt_is_learned(prepare: Call, tok: Any) -> None:
    example = prepare([{"prompt": "Is the sky ", "completion": "blue"}]).train[0]
    assert learned_text(example, tok).lstrip() == "blue</s>"
    assert "blue" not in tok.decode(example.prompt_ids)


def test_a_first_assistant_turn_is_learned_without_its_header(prepare: Call, tok: Any) -> None:
    example = prepare([{"messages": [ANSWER, *TURNS[2:]]}], chat_template="chatml").train[0]
    assert learned_text(example, tok) == "Yes, it is.</s>No.</s>"


@pytest.mark.parametrize("content", ["assistant", "s", "hi"])
def test_a_header_is_told_from_content_that_looks_like_it(prepare: Call, tok: Any, content: str) -> None:
    turns = [{"role": "assistant", "content": content}]
    example = prepare([{"messages": turns}], chat_template="chatml").train[0]
    assert learned_text(example, tok) == f"{content}</s>"


def test_a_template_that_fails_is_the_rows_error(prepare: Call, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ 1 // 0 }}")
    with pytest.raises(RowsError, match="row 1: the chat template failed"):
        prepare([{"messages": TURNS}], chat_template=str(tmp_path / "own.jinja"))


def test_inst_text_that_ends_with_a_question_does_not_learn_it(prepare: Call, tok: Any) -> None:
    example = prepare([{"text": "<s>[INST] Q [/INST] A </s><s>[INST] and then?"}]).train[0]
    assert learned_text(example, tok) == " A </s>"


def test_an_unknown_token_is_no_end(prepare: Call, tmp_path: Path) -> None:
    unk, eos = "<unk>", "</s>"
    words = Tokenizer(models.WordLevel({unk: 0, eos: 1, "yes": 2, "it": 3, "is": 4}, unk_token=unk))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unk, eos_token=eos)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    turns = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes so it is"}]
    settings = {"tokenizer": tokenizer, "chat_template": str(tmp_path / "own.jinja"), "allow_lost_characters": True}
    prepared = prepare([{"messages": turns}], **settings)
    assert prepared.train[0].labels == [IGNORED, IGNORED, 2, 0, 3, 4, 1]
    assert prepared.ledger.characters_lost == {"o": 1, "s": 1}  # of "so"; other words that hold them have a token
    assert prepared.ledger.answer_characters_lost == 2


def test_no_percentile_is_above_the_longest_row(prepare: Call) -> None:
    ledger = prepare([{"text": "a"}, {"text": "b" * 50}]).ledger
    assert ledger.length_p95 <= ledger.length_max


def test_a_role_that_is_no_text_is_refused(prepare: Call) -> None:
    with pytest.raises(RowsError, match="row 1 turn 1: unknown role"):
        prepare([{"conversations": [{"from": ["gpt"], "value": "x"}]}], chat_template="inst")


def test_loss_on_all_takes_a_template_that_cannot_be_split(prepare: Call, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}</s>")
    assert prepare([{"messages": TURNS}], chat_template=str(tmp_path / "own.jinja"), loss_on="all").train
