"""Several data sets: how often each is taken, in which order, and what is counted of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.data import Prepared
from nybble.errors import RecipeError
from nybble.recipe import load_recipe, save_recipe

Call = Callable[..., Prepared]


@pytest.fixture
def mixed(prepare: Call, tmp_path: Path) -> Call:
    """`mixed(a={..}, b={..}, **settings)`: the sets a (10 rows), b (4) and c (6 conversations), each as described."""
    texts = {"a": [{"text": f"[INST] a [/INST] {n}"} for n in range(10)]}
    texts["b"] = [{"prompt": "b ", "completion": str(n)} for n in range(4)]
    texts["c"] = [{"question": "c", "answer": str(n), "source": "web"} for n in range(6)]
    for name, rows in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(a: Any = None, b: Any = None, c: Any = None, **settings: Any) -> Prepared:
        given = {"a": a, "b": b, "c": c}
        sets = [{"path": str(tmp_path / f"{k}.jsonl"), **v} for k, v in given.items() if v is not None]
        return prepare([{"text": "unused"}], dataset_name=sets, **settings)

    return run


def texts(prepared: Prepared, tok: Any) -> list[str]:
    found = [tok.decode(example.input_ids, skip_special_tokens=True) for example in prepared.train]
    return [text.replace("[INST] ", "").replace(" [/INST]", "") for text in found]


def test_rows_are_spread_evenly_and_numbered_anew(mixed: Call, tok: Any) -> None:
    done = mixed(a={}, b={})
    assert "".join(text[0] for text in texts(done, tok)) == "abaaabaabaaaba"
    assert [text for text in texts(done, tok) if text[0] == "a"] == [f"a {n}" for n in range(10)]
    assert [example.row for example in done.train] == list(range(1, 15))
    assert done.train.column("row").tolist() == list(range(1, 15))
    assert [example.row for example in done.train[3:5]] == [4, 5]


@pytest.mark.parametrize(
    ("described", "numbers"),
    [
        ({"weight": 2}, [0, 1, 2, 3, 0, 1, 2, 3]),
        ({"weight": 0.5}, [0, 2]),
        ({"weight": 1.5}, [0, 1, 2, 3, 0, 2]),
        ({"weight": 0.01}, [0]),
        ({"rows": 3}, [0, 1, 2]),
        ({"rows": 6}, [0, 1, 2, 3, 0, 2]),
    ],
)
def test_a_set_is_taken_as_often_as_it_says(mixed: Call, tok: Any, described: Any, numbers: list[int]) -> None:
    found = [text for text in texts(mixed(a={}, b=described), tok) if text[0] == "b"]
    assert found == [f"b {n}" for n in numbers]


def test_one_set_alone_may_be_a_list(mixed: Call, prepare: Call, tmp_path: Path) -> None:
    alone = mixed(a={})
    named = prepare([{"text": "unused"}], dataset_name=str(tmp_path / "a.jsonl"))
    assert list(alone.train) == list(named.train)
    assert (alone.ledger, alone.fingerprint) == (named.ledger, named.fingerprint)
    assert len(mixed(a={"weight": 2}).train) == 20


def test_each_set_has_a_ledger(mixed: Call, tmp_path: Path) -> None:
    done = mixed(a={}, b={"weight": 2}, c={}, chat_template="inst")
    ledger = done.ledger
    assert (ledger.shape, ledger.rows_read, ledger.rows_duplicate) == ("text + prompt_completion + qa", 24, 4)
    a, b, c = (ledger.sets[str(tmp_path / f"{name}.jsonl")] for name in "abc")
    assert [(part.shape, part.rows_used) for part in (a, b, c)] == [("text", 10), ("prompt_completion", 8), ("qa", 6)]
    assert a.tokens_trained + b.tokens_trained + c.tokens_trained == ledger.tokens_trained
    assert (a.not_used, c.not_used, ledger.not_used) == ({}, {"source": 6}, {"source": 6})
    assert any(line.startswith(f"{tmp_path / 'b.jsonl'}: 8 rows to train, ") for line in ledger.in_words)


def test_a_set_may_say_what_its_own_columns_hold(prepare: Call, tok: Any, tmp_path: Path) -> None:
    rows = {"a": {"ask": "a", "reply": "1"}, "b": {"ask": "b", "best": "2", "reply": "3", "system": "x"}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    own = {"columns": "question=ask,answer=best", "ignore_columns": ["system"]}
    sets = [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), **own}]
    done = prepare([{"text": "unused"}], dataset_name=sets, columns="question=ask,answer=reply", chat_template="inst")
    assert [text.strip() for text in texts(done, tok)] == ["a 1", "b 2"]
    assert done.ledger.not_used == {"reply": 1, "system": 1}


def test_no_row_is_both_held_out_and_trained_on(mixed: Call, tok: Any) -> None:
    done = mixed(a={"weight": 3}, b={"weight": 2}, eval_fraction=0.2)
    held = {tuple(example.input_ids) for example in done.held_out}
    assert held
    assert not held & {tuple(example.input_ids) for example in done.train}
    ledger = done.ledger
    assert sum(part.rows_held_out for part in ledger.sets.values()) == ledger.rows_held_out
    assert sum(part.rows_dropped for part in ledger.sets.values()) == ledger.rows_dropped
    assert ledger.rows_used + ledger.rows_held_out + ledger.rows_dropped == ledger.rows_read == 38


def test_rows_that_were_split_stay_together(mixed: Call) -> None:
    done = mixed(a={}, c={}, chat_template="inst", max_length=22, overlong="split")
    assert sorted(done.train.column("row").tolist()) == done.train.column("row").tolist()


def test_the_fingerprint_is_of_the_sets_and_of_how_often_they_are_taken(mixed: Call) -> None:
    mixtures = [mixed(a={}, b={}), mixed(a={}, b={"weight": 2}), mixed(a={}, c={}, chat_template="inst"), mixed(b={})]
    assert len({done.fingerprint for done in mixtures}) == 4
    assert mixed(a={}, b={"weight": 2}).fingerprint == mixed(a={}, b={"rows": 8}).fingerprint


def test_one_path_twice_is_told_apart(prepare: Call, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("train", "test"):
        (tmp_path / "d" / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} {name}"}) + "\n")
    path = str(tmp_path / "d")
    done = prepare([{"text": "unused"}], dataset_name=[path, {"path": path, "split": "test"}])
    assert list(done.ledger.sets) == [f"{path} (1)", f"{path} (2)"]
    assert done.ledger.rows_used == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset_name": "[]"}, "dataset_name names no set"),
        ({"dataset_name": "[{path: a, weight: 0}]"}, "data.dataset_name: got"),
        ({"dataset_name": "[{path: a, share: 1}]"}, "data.dataset_name: got"),
        ({"dataset_name": "[{path: a, weight: 2, rows: 3}]"}, "data.dataset_name: got"),
        ({"dataset_name": "[{path: a, columns: ask=b}]"}, "'ask=b' names no column; write role=column"),
        ({"dataset_name": "[{path: a, data_format: odd}]"}, "data.dataset_name: got"),
        ({"dataset_name": "[a, b]", "max_train_rows": 3}, "max_train_rows is for one data set; give rows to each set"),
        ({"dataset_name": "[a, b]", "eval_dataset_split": "test"}, "eval_dataset_split is for one data set"),
        ({"dataset_name": "[{path: 'https://me:secret@a.example/x'}]"}, "holds a token or a password"),
    ],
)
def test_sets_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(None, settings)
    assert "\n" not in str(caught.value)


def test_sets_are_written_in_a_recipe_and_on_the_command_line(tmp_path: Path) -> None:
    sets = [{"path": "a.jsonl", "weight": 0.5}, {"path": "b", "split": "test", "rows": 9}]
    (tmp_path / "r.yaml").write_text(f"dataset_name: {json.dumps(sets)}\nsplit: first\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert load_recipe(None, {"dataset": json.dumps(sets), "split": "first"}) == recipe
    (tmp_path / "s.yaml").write_text(save_recipe(recipe))
    assert load_recipe(tmp_path / "s.yaml") == recipe
    assert [(part.path, part.split) for part in recipe.data.sets] == [("a.jsonl", "first"), ("b", "test")]
