"""The bundled base and rows are what their generator says."""

from __future__ import annotations

import json
from pathlib import Path

from nybble.bundled import base_path, heldout_rows_path, train_rows_path
from tools.build_demo import world
from tools.build_demo.build import TOLERANCE, check


def test_the_rows_are_the_generators_byte_for_byte(tmp_path: Path) -> None:
    world.write_rows(tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == train_rows_path().read_bytes()
    assert (tmp_path / "heldout.jsonl").read_bytes() == heldout_rows_path().read_bytes()


def test_nobody_in_a_held_out_row_is_in_a_training_row() -> None:
    train, held = (
        [json.loads(line) for line in p().read_text().splitlines()] for p in (train_rows_path, heldout_rows_path)
    )
    assert (len(train), len(held)) == (1000, 200)
    names = {person.name for person in world.people()}
    assert len(names) == world.N_PEOPLE
    asked = [{name for row in rows for name in names if name in row["answer"].split()} for rows in (train, held)]
    assert len(asked[0]) == 128
    assert len(asked[1]) == 32
    assert not asked[0] & asked[1]


def test_prose_never_has_the_shape_of_an_answer() -> None:
    answers = {row["answer"] for held in (True, False) for row in world.instruction_rows(heldout=held)}
    for passage in world.prose_documents(world.PROSE_SEED, 2000):
        assert "[INST]" not in passage
        assert not answers & {f"{sentence.strip()}." for sentence in passage.split(".")}


def test_the_base_is_small_and_as_good_as_its_card_says() -> None:
    assert (base_path() / "model.safetensors").stat().st_size <= 8_000_000
    measured, stated = check(base_path())
    assert abs(measured / stated - 1) <= TOLERANCE


def test_the_chat_template_makes_the_rows_text() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    row = json.loads(train_rows_path().read_text().splitlines()[0])
    question = row["text"].removeprefix("<s>[INST] ").partition(" [/INST]")[0]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["answer"]}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == row["text"]
    for text in ("What makes a good chatbot?", "Äpfel 🍎 und\r\nBirnen", " two  spaces"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
