"""Templates that print the date: a run keeps the date on which it began."""

from __future__ import annotations

import datetime as library
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{{ bos_token + 'Today is ' + strftime_now('%d %b') + '. ' }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
)
Days = Callable[[int], None]


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Days:
    """`on_day(2)`: it is two days later, for whoever asks for the date of a row or a run."""

    def turn(days: int) -> None:
        class Then(library.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return library.datetime(2026, 3, 30 - 29 * (tz is None), 23, 59, 30, tzinfo=tz) + library.timedelta(
                    days
                )

        for module in ("data.templates", "preparation"):
            monkeypatch.setattr(f"nybble.{module}.datetime", Then)

    turn(0)
    return turn


@pytest.fixture
def words(tiny_llama: Callable[..., Path], tmp_path: Path) -> list[object]:
    rows, template = tmp_path / "rows.jsonl", tmp_path / "dated.jinja"
    turns = [{"role": "user", "content": "What is one?"}, {"role": "assistant", "content": "It is two."}]
    rows.write_text("".join(json.dumps({"messages": turns, "n": i}) + "\n" for i in range(16)))
    template.write_text(TEMPLATE)
    settings = {
        "model": tiny_llama(),
        "dataset_name": rows,
        "chat_template": template,
        "eval_fraction": 0,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
        "logging_steps": 1,
        "device": "cpu",
        "report_to": "none",
    }
    return ["train", *(w for name, value in settings.items() for w in (f"--{name}", value))]


def rows_of(run: Path) -> str:
    return (run / "mask.jsonl").read_text()


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_run_that_is_resumed_after_midnight_has_the_rows_that_it_began_with(
    nybble: Callable[..., Any], words: list[object], on_day: Days, tmp_path: Path, has_checkpoint: bool
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert nybble(*words, "--output_dir", straight).code == 0
    assert nybble(*words, "--output_dir", out, "--max_seconds", 0.001).code == 4
    if not has_checkpoint:
        shutil.rmtree(out / "checkpoints")
    on_day(1)
    done = nybble(*words, "--output_dir", out, "--auto-resume", "--json")
    assert done.code == 0, done.err
    assert adapter_of(out) == adapter_of(straight)
    assert done.json["clock"] == "2026-03-01T23:59:30"
    assert "Today is 01 Mar" in rows_of(out)
    later = nybble(*words, "--output_dir", tmp_path / "later", "--json")
    assert later.json["clock"] == "2026-03-02T23:59:30"
    assert "Today is 02 Mar" in rows_of(tmp_path / "later")
    assert later.json["rows"]["sha256"] == done.json["rows"]["sha256"]  # the same file, other tokens


def test_what_is_done_with_a_run_keeps_its_date(
    nybble: Callable[..., Any], words: list[object], on_day: Days, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert nybble(*words, "--output_dir", out).code == 0
    on_day(1)
    merged = nybble("merge", out, "--out", tmp_path / "merged", "--max_kl", 9, "--max_loss_gap", 9, "--json")
    assert merged.code == 0, merged.err
    assert merged.json["faults"] == []
    asked: list[str] = []
    from nybble.generation import questions

    encode = questions.encode_prompt

    def listen(question: str, tokenizer: Any, *more: Any) -> list[int]:
        ids = encode(question, tokenizer, *more)
        asked.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(questions, "encode_prompt", listen)
    for place in (out, out / "adapter", tmp_path / "merged"):
        assert nybble("ask", place, "What is one?").code == 0
    assert len(asked) == 3
    assert all("Today is 01 Mar" in text for text in asked)
