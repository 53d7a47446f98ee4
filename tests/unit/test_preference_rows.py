"""Rows of answers that are compared or rated: their shapes, what is learned of them, and what is said of bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.data import Prepared, supervised
from nybble.errors import RowsError

Call = Callable[..., Any]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '|' }}{% endfor %}{{ 'a:' if add_generation_prompt }}"
)
ASK = {"role": "user", "content": "Q"}
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}
BEFORE = [ASK, {"role": "assistant", "content": "P"}, {"role": "user", "content": "R"}]


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    return str(tmp_path / "t.jinja")


@pytest.fixture
def sides(prepare: Call, tok: Any) -> Call:
    """`sides(row, **settings)` -> prompt, chosen and rejected of the one pair as text, and what is learned of each."""

    def run(row: dict[str, Any], **settings: Any) -> tuple[list[str], list[str], Prepared]:
        done = prepare([row], **{"objective": "dpo", **settings})
        (example,) = done.train
        assert example.is_pair
        assert [parent for _length, parent in example.segments] == [-1, 0, 0]
        texts, learned = [], []
        first = 0
        for length, _parent in example.segments:
            own = slice(first, first + length)
            texts.append(tok.decode(example.input_ids[own]))
            learned.append(tok.decode([label for label in example.labels[own] if label >= 0]))
            first += length
        assert first == len(example.input_ids)
        return texts, learned, done

    return run


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Is it?", "chosen": " Yes", "rejected": " No"}, "<s>Is it?", " Yes</s>", " No</s>"),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        ({"prompt": [ASK], "chosen": "Yes", "rejected": "No"}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        ({"prompt": "Q", "chosen": [YES], "rejected": [NO]}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        ({"chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        ({"prompt": "Q", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        ({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        ({"chosen": [*BEFORE, YES], "rejected": [*BEFORE, NO]}, "<s>u:Q|a:P</s>u:R|a:", "Yes</s>", "No</s>"),
        ({"question": "Q", "chosen": "Yes", "rejected": "No"}, "<s>u:Q|a:", "Yes</s>", "No</s>"),
        (
            {"system": "S", "question": "Q", "chosen": "Yes", "rejected": "No"},
            "<s>s:S|u:Q|a:",
            "Yes</s>",
            "No</s>",
        ),
        (
            {"instruction": "Q", "input": "I", "chosen": "Yes", "rejected": "No", "history": [["A", "B"]]},
            "<s>u:A|a:B</s>u:Q\n\nI|a:",
            "Yes</s>",
            "No</s>",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "Yes"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            "<s>u:Q|a:",
            "Yes</s>",
            "No</s>",
        ),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "<s>u:Q|a:", "Yes</s>", "Yes</s>"),
        ({"prompt": "Is it? ", "chosen": "", "rejected": "No"}, "<s>Is it? ", "</s>", "No</s>"),
        ({"prompt": "Is", "chosen": " it", "rejected": " it is"}, "<s>Is", " it</s>", " it is</s>"),
    ],
)
def test_shapes_of_pairs(
    sides: Call, template: str, row: dict[str, Any], prompt: str, chosen: str, rejected: str
) -> None:
    texts, learned, done = sides(row, chat_template=template)
    assert texts == [prompt, chosen, rejected]
    assert learned == ["", chosen, rejected]
    assert done.train[0].prompt_ids == done.train[0].input_ids[: done.train[0].segments[0][0]]
    assert done.ledger.not_used == {}


def test_each_side_has_the_tokens_of_a_supervised_row(prepare: Call, template: str) -> None:
    row = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}
    pair = prepare([row], objective="ipo", chat_template=template).train[0]
    (n_prompt, _), (n_chosen, _), _ = pair.segments
    for completion, own in (
        ([YES], pair.input_ids[: n_prompt + n_chosen]),
        ([NO], [*pair.input_ids[:n_prompt], *pair.input_ids[n_prompt + n_chosen :]]),
    ):
        alone = prepare([{"prompt": [ASK], "completion": completion}], chat_template=template).train[0]
        assert alone.input_ids == own


def test_a_prompt_whose_last_token_depends_on_the_answer_is_parted_before_it(sides: Call) -> None:
    texts, learned, _ = sides({"prompt": "Is the sky", "chosen": "? Yes", "rejected": " blue"})
    assert "".join(texts[:2]) == "<s>Is the sky? Yes</s>"
    assert texts[0] + texts[2] == "<s>Is the sky blue</s>"
    assert learned[1].endswith("? Yes</s>")
    assert learned[2].endswith(" blue</s>")


def test_columns_are_named_for_pairs(sides: Call, template: str) -> None:
    row = {"ask": "Q", "better": "Yes", "worse": "No", "score": 3}
    texts, _, done = sides(row, columns="question=ask,chosen=better,rejected=worse", chat_template=template)
    assert texts == ["<s>u:Q|a:", "Yes</s>", "No</s>"]
    assert done.ledger.not_used == {"score": 1}


def test_supervised_rows_may_be_the_chosen_answers(prepare: Call, tok: Any) -> None:
    row = {"prompt": "Is it? ", "chosen": "Yes", "rejected": "No"}
    (example,) = prepare([row], data_format="preference").train
    assert tok.decode(example.input_ids) == "<s>Is it? Yes</s>"
    assert not example.is_pair
    with pytest.raises(RowsError, match=r"hold several answers, .*; --objective dpo learns which of them"):
        prepare([row])


# Rated answers


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "Is it?", "completion": " Yes", "label": True}, "<s>Is it?", " Yes</s>"),
        ({"prompt": [ASK], "completion": [YES], "label": 0}, "<s>u:Q|a:", "Yes</s>"),
        ({"messages": [*BEFORE, YES], "label": "False"}, "<s>u:Q|a:P</s>u:R|a:", "Yes</s>"),
        ({"messages": [ASK, YES], "kto_tag": False}, "<s>u:Q|a:", "Yes</s>"),
        (
            {"instruction": "Q", "output": "Yes", "kto_tag": True, "history": [["A", "B"]]},
            "<s>u:A|a:B</s>u:Q|a:",
            "Yes</s>",
        ),
    ],
)  # fmt: skip
def test_shapes_of_rated_answers(
    prepare: Call, tok: Any, template: str, row: dict[str, Any], prompt: str, answer: str
) -> None:
    (example,) = prepare([row], objective="kto", chat_template=template).train
    assert tok.decode(example.input_ids) == prompt + answer
    assert tok.decode([label for label in example.labels if label >= 0]) == answer
    label = row.get("label", row.get("kto_tag"))
    assert example.is_desirable is (label is True)
    assert not example.segments


def test_a_pair_is_two_rated_answers(prepare: Call, tok: Any, template: str) -> None:
    rows = [{"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, {"prompt": [ASK], "chosen": [NO], "rejected": [YES]}]
    done = prepare(rows, objective="kto", chat_template=template)
    rated = [(e.row, tok.decode(e.input_ids), e.is_desirable) for e in done.train]
    assert rated == [
        (1, "<s>u:Q|a:Yes</s>", True),
        (1, "<s>u:Q|a:No</s>", False),
        (2, "<s>u:Q|a:No</s>", True),
        (2, "<s>u:Q|a:Yes</s>", False),
    ]
    assert done.train.column("is_desirable").tolist() == [True, False, True, False]
    counts = done.ledger.preferences
    assert counts is not None
    assert (counts.good_answers, counts.bad_answers, done.ledger.rows_split, done.ledger.rows_duplicate) == (2, 2, 0, 0)
    assert "2 good and 2 bad answers" in done.ledger.in_words


# The ledger


def test_the_ledger_counts_pairs(prepare: Call) -> None:
    rows = [
        {"prompt": "Is it? ", "chosen": "Yes", "rejected": "No, it is not"},
        {"prompt": "Is it? ", "chosen": "No", "rejected": "No"},
        {"prompt": "Is it? ", "chosen": "", "rejected": "No"},
        {"prompt": "Is it? ", "chosen": "x", "rejected": "abcdefghijklmnopqrstuvw"},
        {"prompt": "Is it? ", "chosen": "zyxwvutsrqponmlkjihgfedcba", "rejected": "abcdefghijklmnopqrstuvw"},
        {"prompt": "abcdefghijklmnopqrstuvw ", "chosen": "Yes", "rejected": "No"},
    ]
    done = prepare(rows, objective="dpo", max_length=20)
    counts = done.ledger.preferences
    assert counts is not None
    assert (counts.pairs, counts.pairs_equal, counts.pairs_lost) == (5, 1, 1)
    assert (counts.pairs_cut_on_one_side, counts.pairs_cut_on_both_sides) == (1, 1)
    assert done.ledger.rows_dropped == 1
    assert done.ledger.answers_empty == 1
    assert counts.chosen_longer_fraction == pytest.approx(1 / 5)
    lengths = [e.segments[1][0] for e in done.train]
    assert counts.chosen_tokens_mean == pytest.approx((sum(lengths[:4]) + 27) / 5)
    assert counts.tokens_shared == sum(e.segments[0][0] for e in done.train)
    for words in (
        r"5 pairs: chosen answers have", "1 pairs are cut on one side only, 1 on both",
        "1 pairs are dropped because max_length leaves nothing", "1 pairs have equal answers",
    ):  # fmt: skip
        assert any(words in line for line in done.ledger.in_words)
    dropped = prepare(rows, objective="dpo", max_length=20, overlong="drop")
    assert [e.row for e in dropped.train] == [1, 2, 3]
    assert dropped.ledger.rows_dropped == 3


def test_a_cut_side_keeps_at_least_a_token(prepare: Call) -> None:
    row = {"prompt": "abcdefghij", "chosen": "klmnopqrstuvwxyz", "rejected": "No"}
    for longest in range(8, 30):
        if longest < 11:  # nothing is left of the answers
            with pytest.raises(RowsError, match=r"has a token to learn within max_length"):
                prepare([row], objective="dpo", max_length=longest, allow_no_stop=True)
            continue
        (example,) = prepare([row], objective="dpo", max_length=longest, allow_no_stop=True).train
        n_prompt, n_chosen, n_rejected = (length for length, _ in example.segments)
        assert max(n_chosen, n_rejected) + n_prompt <= longest
        learned = [label >= 0 for label in example.labels]
        assert any(learned[n_prompt : n_prompt + n_chosen])
        assert any(learned[n_prompt + n_chosen :])


# Bad input


@pytest.mark.parametrize(
    ("row", "objective", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "dpo", r"row 1: column 'rejected' holds no answer, beside "),
        ({"chosen": [ASK, YES], "rejected": []}, "dpo", r"row 1: column 'rejected' holds no answer"),
        ({"prompt": "a", "chosen": "b"}, "dpo", r"has 'chosen', but no column for the other answer, and objective dpo"),
        ({"text": "a"}, "simpo", r"has the columns text, and objective simpo needs two answers, of which one is prefe"),
        ({"text": "a"}, "kto", r"has the columns text, and objective kto needs answers that are rated or compared: pr"),
        ({"prompt": "a", "completion": "b"}, "kto", r"objective kto needs answers that are rated or compared: prompt "),
        ({"text": "a", "label": True}, "kto", r"text without a prompt is not rated; objective kto needs prompt \+ com"),
        ({"prompt": "a", "completion": "b", "label": True}, "orpo", r"objective orpo needs two answers, of which one "),
        ({"prompt": "a", "completion": "b", "label": 2}, "kto", r"column 'label' holds 2; a label is true \(a good an"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "kto", r"column 'label' holds 'good'; a label is true "),
        ({"prompt": "a", "completion": "b", "label": None}, "kto", r"column 'label' holds None; a label is true"),
        ({"prompt": "a", "completion": "b", "label": [1]}, "kto", r"column 'label' holds \[1\]; a label is true"),
        (
            {"chosen": [ASK, YES], "rejected": [{"role": "user", "content": "other"}, NO]},
            "dpo",
            r"what stands before its two answers begins with no common turn; both must answer one prompt",
        ),
        (
            {"chosen": [*BEFORE, YES], "rejected": [*BEFORE[:2], {"role": "user", "content": "other"}, NO]},
            "dpo",
            r"what stands before its two answers differs in turn 3, no answer; both must answer one prompt",
        ),
        ({"chosen": [ASK, YES], "rejected": "No"}, "dpo", r"one of its answers is text and the other messages; repair"),
        ({"chosen": "Q: a? A: b", "rejected": "Q: a? A: c"}, "dpo", r"begins alike for 9 characters, and no column sa"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "dpo", r"its prompt is empty; both answers must follow one"),
        ({"prompt": "", "completion": "b", "label": 1}, "kto", r"its prompt is empty; an answer must follow one"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "dpo", r"column 'chosen' is of type int, neither text nor mes"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "dpo", r"column 'prompt' holds 3, not a list of turns"),
        (
            {"prompt": "W", "chosen": [ASK, YES], "rejected": [ASK, NO]},
            "dpo",
            r"column 'prompt' says what no turn before its two answers says; leave it out with --ignore_columns prompt",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "image": "x.png"}, "dpo", r"'image' holds what preference ro"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(prepare: Call, template: str, row: dict[str, Any], objective: str, said: str) -> None:
    with pytest.raises(RowsError, match=said) as caught:
        prepare([row], objective=objective, chat_template=template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"prompt": "a", "chosen": "b", "rejected": None}, {"prompt": "a", "chosen": "b"}])
def test_bad_rows_are_skipped_where_that_is_asked_for(prepare: Call, bad: dict[str, Any]) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, bad]
    done = prepare(rows, objective="dpo", on_bad_row="skip")
    assert (len(done.train), done.ledger.rows_skipped) == (1, 1)
    assert "'rejected'" in done.ledger.skipped[0]


def test_a_kto_row_without_a_label_is_skipped(prepare: Call) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": "?"}]
    done = prepare(rows, objective="kto", on_bad_row="skip")
    assert (len(done.train), done.ledger.rows_skipped) == (1, 1)


def test_pairs_are_held_out_and_not_learned_as_well(prepare: Call) -> None:
    rows = [{"prompt": f"{i % 7} is", "chosen": "b", "rejected": "c"} for i in range(40)]
    done = prepare(rows, objective="dpo", eval_fraction=0.1)
    assert len(done.held_out) == 4
    held = {tuple(e.input_ids) for e in done.held_out}
    assert not held & {tuple(e.input_ids) for e in done.train}
    assert all(e.is_pair for e in done.held_out)


def test_pairs_and_rated_answers_as_supervised_rows(prepare: Call, template: str) -> None:
    rows = [{"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, {"prompt": [ASK], "chosen": [NO], "rejected": [YES]}]
    pairs = prepare(rows, objective="dpo", chat_template=template).train
    alone = prepare(rows, data_format="preference", chat_template=template).train
    assert [e.is_pair for e in alone] == [False, False]
    for mine, wanted in zip(supervised(pairs), alone, strict=True):
        for name in ("input_ids", "labels", "segments", "spans", "n_stops", "n_answers", "prompt_ids", "n_trained"):
            assert getattr(mine, name) == getattr(wanted, name)
    assert [e.input_ids for e in supervised(pairs)[1:]] == [alone[1].input_ids]
    rated = prepare(rows, objective="kto", chat_template=template).train
    assert [e.input_ids for e in supervised(rated)] == [e.input_ids for e in alone]
    bad = {"prompt": [ASK], "completion": [NO], "label": False}
    assert len(supervised(prepare([bad], objective="kto", chat_template=template).train)) == 1  # better than none
    assert supervised(alone) is alone
