"""What the ledger counts, and what becomes of rows that are too long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nybble.data import IGNORED, Prepared, contexts, prepare_rows, read_rows
from nybble.errors import RowsError
from nybble.recipe import DataSection, EvaluationSection
from nybble.reporting import ledger_lines

Call = Callable[..., Prepared]
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
SHORT = {"text": "<s>[INST] Q [/INST] A </s>"}
LONG = {"text": "<s>[INST] Q [/INST] " + "A " * 40 + "</s>"}
EXCHANGE = "<s>[INST] {0} [/INST] {0} </s>"
LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
TURNS = [
    {"role": "system", "content": "Be brief."},
    *({"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")),
]


def learned(prepared: Prepared, tokenizer: Any) -> list[str]:
    return [tokenizer.decode([i for i in e.labels if i != IGNORED]) for e in prepared.train]


def test_every_line_of_a_small_ledger(prepare: Call) -> None:
    many = {"text": EXCHANGE.format("a") + EXCHANGE.format("b")}
    ledger = prepare([SHORT, SHORT, many, LONG, {"text": "<s>[INST] Q [/INST] </s>"}], max_length=60).ledger
    assert (ledger.rows_read, ledger.rows_used, ledger.rows_dropped, ledger.rows_held_out) == (5, 5, 0, 0)
    assert (ledger.rows_over_max_length, ledger.rows_truncated, ledger.rows_split, ledger.examples) == (1, 1, 0, 5)
    assert (ledger.rows_duplicate, ledger.rows_multi_turn, ledger.answers_empty) == (1, 1, 1)
    assert (ledger.turns, ledger.stop_tokens_trained, ledger.stop_tokens_cut) == (6, 5, 1)
    assert ledger.stop_token_trained_fraction == pytest.approx(5 / 6)
    assert ledger.tokens_total == ledger.tokens_trained + ledger.tokens_masked
    assert ledger.length_p50 <= ledger.length_p95 <= ledger.length_p99 == ledger.length_max > 60


def test_the_99th_percentile_is_the_length_that_keeps_99_percent(prepare: Call) -> None:
    rows = [{"text": "a" * (n + 1)} for n in range(200)]
    ledger = prepare(rows, max_length=8).ledger
    kept = prepare(rows, max_length=ledger.length_p99).ledger
    assert kept.rows_over_max_length == 2
    assert prepare(rows, max_length=ledger.length_p99 - 1).ledger.rows_over_max_length > 2


def test_long_rows_are_dropped_when_asked(prepare: Call, tok: Any) -> None:
    done = prepare([SHORT, LONG], max_length=30, overlong="drop")
    assert learned(done, tok) == [" A </s>"]
    ledger = done.ledger
    assert (ledger.rows_dropped, ledger.rows_over_max_length, ledger.rows_truncated) == (1, 1, 0)
    assert ledger.stop_token_trained_fraction == 1.0


def test_long_text_is_split_between_its_exchanges(prepare: Call, tok: Any) -> None:
    row = {"text": "".join(EXCHANGE.format(letter) for letter in "abcde")}
    one = len(prepare([{"text": EXCHANGE.format("a")}]).train[0].input_ids)
    done = prepare([row, SHORT], max_length=2 * one + 1, overlong="split")
    assert learned(done, tok) == [" a </s> b </s>", " c </s> d </s>", " e </s>", " A </s>"]
    assert [e.row for e in done.train] == [1, 1, 1, 2]
    ledger = done.ledger
    assert (ledger.rows_used, ledger.rows_split, ledger.examples, ledger.rows_truncated) == (2, 1, 4, 0)
    assert (ledger.rows_read, ledger.turns, ledger.stop_tokens_trained) == (2, 6, 6)


@pytest.mark.parametrize("template", ["inst", "chatml"])
def test_long_conversations_are_split_and_keep_their_system_text(prepare: Call, tok: Any, template: str) -> None:
    whole = prepare([{"messages": TURNS}], chat_template=template)
    done = prepare(
        [{"messages": TURNS}], chat_template=template, max_length=len(whole.train[0].input_ids) - 1, overlong="split"
    )
    assert len(done.train) == 2
    assert "".join(learned(done, tok)) == "".join(learned(whole, tok))
    for example in done.train:
        assert "Be brief." in tok.decode(example.input_ids)
        assert example.input_ids.count(tok.bos_token_id) == tok.decode(example.input_ids).count("<s>")
    assert done.ledger.stop_tokens_trained == 4


@pytest.mark.parametrize(
    ("system", "exchange"),
    [
        ("", "<s>[INST] {1}{0} [/INST] {0} </s>"),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n",
            "{1}<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n{0}<|im_end|>\n",
        ),
        ("<|system|>\nBe brief.<|end|>\n", "{1}<|user|>\n{0}<|end|>\n<|assistant|>\n{0}<|end|>\n"),
        (
            LLAMA_3.format("system", "Be brief."),
            "{1}" + LLAMA_3.format("user", "{0}") + LLAMA_3.format("assistant", "{0}"),
        ),
    ],
    ids=["inst", "chatml", "phi3", "llama3"],
)
def test_split_text_keeps_its_system_text(prepare: Call, tok: Any, system: str, exchange: str) -> None:
    system = system or "<<SYS>>\nBe brief.\n<</SYS>>\n\n"
    row = {"text": exchange.format("a", system) + exchange.format("b", "") + exchange.format("c", "")}
    one = prepare([{"text": exchange.format("c", system)}])
    done = prepare([row], max_length=len(one.train[0].input_ids), overlong="split")
    assert [tok.decode(e.prompt_ids).count("Be brief.") for e in done.train] == [1, 1, 1]
    assert done.train[2] == replace(one.train[0], row=1)
    assert "".join(learned(done, tok)) == "".join(learned(prepare([row]), tok))


def test_an_exchange_that_is_too_long_by_itself_is_cut_and_counted(prepare: Call) -> None:
    ledger = prepare([{"text": SHORT["text"] + LONG["text"]}], max_length=30, overlong="split").ledger
    assert (ledger.rows_split, ledger.rows_truncated, ledger.stop_tokens_cut, ledger.turns) == (1, 1, 1, 2)


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_a_row_are_held_out_together(prepare: Call, seed: int) -> None:
    rows = [{"text": "".join(EXCHANGE.format(f"{n}{letter}") for letter in "abc")} for n in range(10, 30)]
    done = prepare(rows, max_length=40, overlong="split", eval_fraction=0.2, seed=seed)
    held = {example.row for example in done.held_out}
    assert len(held) == done.ledger.rows_held_out == 4
    assert not held & {example.row for example in done.train}


def test_last_answer_of_text(learns: Call) -> None:
    row = {"text": EXCHANGE.format("a") + EXCHANGE.format("b")}
    prompt = "<s>[INST] a [/INST] a </s><s>[INST] b [/INST]"
    done = learns(row, prompt, " b </s>", loss_on="last_answer")
    assert (done.ledger.turns, done.ledger.rows_multi_turn) == (1, 1)


def ascii_tokenizer(unknown: str | None) -> Any:
    """One token for each character of ASCII; others become `unknown`, or vanish if that is None."""
    characters = [*SPECIAL_TOKENS, "\u2581", "\n", *map(chr, range(33, 127))]
    words = models.BPE({token: index for index, token in enumerate(characters)}, [], unk_token=unknown)
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    unk, bos, eos, pad = SPECIAL_TOKENS
    names = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_characters_without_a_token_are_named_and_counted(unknown: str | None, prepare: Call) -> None:
    rows = [SHORT, {"text": "<s>[INST] Q \u2603 [/INST] It is \u2602\u200b\tand " + "A" * 200 + " \u2602 </s>"}]
    ledger = prepare([rows[0], rows[1], rows[1]], ascii_tokenizer(unknown)).ledger
    assert ledger.characters_lost == {"\u2602": 2, "\u2603": 2}
    assert ledger.answer_characters_lost == 4
    assert 400 < ledger.answer_characters < 460
    (line,) = (line for line in ledger.in_words if "no token for" in line)
    assert "'\u2602' (2 rows)" in line
    assert ("characters of answers that are lost", "4") in ledger_lines(asdict(ledger))
    assert prepare(rows).ledger.characters_lost == {}  # bytes spell everything


def test_answers_that_lose_more_than_1_percent_are_refused(prepare: Call) -> None:
    rows = [{"text": "<s>[INST] Q \u2603\u2603\u2603 [/INST] " + "A" * 90 + "\u2602\u2602 </s>"}]
    with pytest.raises(RowsError, match=r"no token for 2\.\d % .*\u2602.* set --allow_lost_characters"):
        prepare(rows, ascii_tokenizer(None))
    assert prepare(rows, ascii_tokenizer(None), allow_lost_characters=True).ledger.answer_characters_lost == 2


def test_advice_on_max_length_knows_the_models_context(prepare: Call) -> None:
    ledger = prepare([LONG, SHORT], max_length=30, allow_no_stop=True).ledger
    advice = f"max_length {ledger.length_p99} would keep 99 % whole"
    assert any(advice in line for line in ledger.in_words)
    short = replace(ledger, context=40).in_words
    assert not any("max_length" in line and "would keep" in line for line in short)
    assert any(f"99 % have at most {ledger.length_p99} tokens, and the model takes 40" in line for line in short)


def test_a_run_without_end_tokens_is_allowed_by_name(prepare: Call) -> None:
    with pytest.raises(RowsError, match="set --allow_no_stop"):
        prepare([LONG], max_length=30)
    ledger = prepare([LONG], max_length=30, allow_no_stop=True).ledger
    assert (ledger.stop_tokens_trained, ledger.tokens_trained > 0) == (0, True)


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["user", "tool", "assistant"], "turn 2: 'tool' follows 'user'; allowed before it: assistant, tool"),
        (["user", "system", "assistant"], "turn 2: 'system' follows 'user'; allowed before it: the beginning"),
        (["tool", "assistant"], "turn 1: 'tool' comes first"),
    ],
)
def test_roles_out_of_order_are_named(prepare: Call, roles: list[str], said: str) -> None:
    turns = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(RowsError, match=f"rows.jsonl row 1 {said}"):
        prepare([{"messages": turns}], chat_template="inst")


@pytest.mark.parametrize("tools", ["{", '{"name": "f"}', "3"])
def test_tools_that_are_no_list_are_refused(prepare: Call, tools: str) -> None:
    with pytest.raises(RowsError, match="row 1: column 'tools'"):
        prepare([{"messages": TURNS, "tools": tools}], chat_template="inst")


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_a_row_of_50_megabytes_is_refused_at_once(tmp_path: Path, tok: Any, name: str) -> None:
    (tmp_path / name).write_text('{"text": "' + "a" * 50_000_000 + '"}\n')
    began = time.monotonic()
    with pytest.raises(RowsError, match="line 1: has more than 16,777,216 characters"):
        prepare_rows(DataSection(dataset_name=str(tmp_path / name)), EvaluationSection(), tok, 0)
    assert time.monotonic() - began < 60


def conversation(n_turns: int, size: int = 1) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": "a" * size} for n in range(n_turns)]}


def test_a_conversation_beyond_bounds_is_refused(prepare: Call) -> None:
    with pytest.raises(RowsError, match="row 1: the text has 2,500,000 characters"):
        prepare([conversation(50, 50_000)], chat_template="inst")


def test_a_conversation_of_20_000_turns_is_read_in_one_go(prepare: Call) -> None:
    ledger = prepare([conversation(20_000)], chat_template="inst", max_length=1_000_000).ledger
    assert (ledger.turns, ledger.stop_tokens_trained, ledger.answers_empty) == (10_000, 10_000, 0)


def test_a_template_that_numbers_its_turns_takes_no_more_than_it_can_search(
    prepare: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "_MOST_SEARCHED", 5)
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ loop.index }} {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    settings = {"chat_template": str(tmp_path / "own.jinja")}
    assert prepare([conversation(10)], **settings).ledger.stop_tokens_trained == 5
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{% if m.content != 'a' %}{{ raise_exception('no a') }}{% endif %}a</s>{% endfor %}"
    )
    assert prepare([conversation(10)], **settings).ledger.stop_tokens_trained == 5
    with pytest.raises(RowsError, match="row 1: the chat template renders each of its 12 turns in a different way"):
        prepare([conversation(12)], **settings)


@pytest.mark.parametrize("indent", [1, 4, None])
@pytest.mark.parametrize("content", [{"text": "a", "more": [1]}, [{"text": "a"}, {"text": "b"}]], ids=["one", "list"])
def test_json_in_any_layout_is_read(tmp_path: Path, indent: int | None, content: Any) -> None:
    import json

    (tmp_path / "r.json").write_text(json.dumps(content, indent=indent))
    found = [row for _, row in read_rows(str(tmp_path / "r.json"))]
    assert found == (content if isinstance(content, list) else [content])


def test_a_row_whose_first_line_ends_with_a_colon_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"text":\n"a"}\n')
    assert [row for _, row in read_rows(str(tmp_path / "r.json"))] == [{"text": "a"}]


def test_broken_json_of_many_lines_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{\n "text": "a",\n "more" 3\n}\n')
    with pytest.raises(RowsError, match=r"r\.json line 3: is not valid JSON"):
        read_rows(str(tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("name", "read", "turns", "multi"),
    [("glaive_toolcall_en_demo.json", 300, 957, 261), ("alpaca_style_1100.json", 1100, 1100, 0)],
)
def test_real_rows_need_no_configuration(shared_data: Path, name: str, read: int, turns: int, multi: int) -> None:
    llama2 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama2")
    data = DataSection(dataset_name=str(shared_data / "rows" / name), max_length=100_000, eval_fraction=0)
    ledger = prepare_rows(data, EvaluationSection(), llama2, 0).ledger
    assert (ledger.rows_read, ledger.turns, ledger.rows_multi_turn) == (read, turns, multi)
    assert ledger.stop_token_trained_fraction == 1.0


def test_the_held_out_rows_are_drawn_by_a_seed_of_their_own(prepare: Callable[..., Prepared]) -> None:
    rows = [{"text": f"[INST] {i} [/INST] {i}"} for i in range(40)]

    def drawn(**settings: Any) -> list[int]:
        return [example.row for example in prepare(rows, eval_fraction=0.25, **settings).held_out]

    assert drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1, eval_seed=3) == drawn(seed=2, eval_seed=3) == drawn(seed=3)


BOOK = "".join(f"On day {n} it rained {n * 7 % 31} mm. " for n in range(60)).strip()


@pytest.mark.parametrize("overlong", ["truncate", "split"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_raw_text_is_parted_and_every_token_is_learned_once(
    prepare: Call, tok: Any, overlong: str, adds_bos: bool
) -> None:
    if not adds_bos:
        tok.backend_tokenizer.post_processor = processors.ByteLevel()
    (whole,) = prepare([{"text": BOOK}], max_length=100_000).train
    begin = whole.input_ids[:1] if adds_bos else []
    # The second size leaves one token for the last piece of a tokenizer without begin token.
    for size in (50, len(whole.input_ids) - 1):
        done = prepare([{"text": BOOK}, {"text": "short"}], max_length=size, overlong=overlong)
        *parts, short = done.train
        assert all(part.input_ids[: len(begin)] == begin for part in parts)
        assert [i for part in parts for i in part.input_ids[len(begin) :]] == whole.input_ids[len(begin) :]
        assert [i for part in parts for i in part.labels[len(begin) :]] == whole.labels[len(begin) :]
        assert {len(part.input_ids) for part in parts[:-1]} <= {size, size - 1}
        assert all(part.n_trained for part in parts)
        assert [part.n_stops for part in parts] == [0] * (len(parts) - 1) + [1]
        for part in parts:
            learned = {i for a, b, _kind in part.spans for i in range(a, b)}
            assert learned == {i for i, label in enumerate(part.labels) if label != IGNORED}
        assert tok.decode(short.input_ids, skip_special_tokens=True) == "short"
        assert (done.ledger.rows_split, done.ledger.rows_truncated, done.ledger.turns) == (1, 0, 2)
        assert (done.ledger.stop_tokens_trained, done.ledger.stop_tokens_cut) == (2, 0)


def test_raw_text_is_parted_between_its_documents(prepare: Call, tok: Any) -> None:
    first, second = BOOK[:200], BOOK[200:300].strip()
    done = prepare([{"text": f"<s>{first}</s><s>{second}</s>"}], max_length=60)
    texts = [tok.decode(example.input_ids) for example in done.train]
    assert "".join(texts).replace("</s>", "\n").replace("<s>", "") == f"{first}\n{second}\n"
    assert [text.endswith("</s>") for text in texts].count(True) == 2
    assert done.ledger.rows_split == 1


def test_raw_text_may_be_dropped(prepare: Call) -> None:
    ledger = prepare([{"text": BOOK}, {"text": "short"}], max_length=50, overlong="drop").ledger
    assert (ledger.rows_used, ledger.rows_dropped) == (1, 1)
