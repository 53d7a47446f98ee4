"""Asking and chatting: from a run, an adapter or a whole model, with adapters on, off and exchanged."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nybble as library
from nybble.errors import InputError, ModelError
from nybble.generation import Chat, ask, read_questions
from nybble.recipe import load_recipe

QUESTIONS = ("What is two?", "What is five?")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> dict[str, Path]:
    """Two runs on one base: to the next number, and to the one before."""
    folder = tmp_path_factory.mktemp("runs")
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    for name, step in (("next", 1), ("before", -1)):
        rows = [f"<s>[INST] What is {words[i % 8]}? [/INST] It is {words[(i + step) % 8]}. </s>" for i in range(40)]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        values = {"model_name_or_path": tiny_llama(), "dataset_name": file, "output_dir": folder / name}
        values |= {"learning_rate": 1e-2, "max_steps": 100, "n_samples": 0, "device": "cpu", "report_to": "none"}
        library.train(load_recipe(None, {k: str(v) for k, v in values.items()}))
    return {name: folder / name for name in ("next", "before")}


def test_an_adapter_answers_as_its_run_wherever_it_lies(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["next"] / "adapter", tmp_path / "adapter")
    of_run, of_adapter = ask(runs["next"], QUESTIONS), ask(tmp_path / "adapter", QUESTIONS)
    assert of_run == of_adapter
    assert all(answer.tuned.startswith("It is ") and answer.tuned.endswith(".") for answer in of_run)
    assert all(answer.base not in (None, answer.tuned) for answer in of_run)


def test_adapters_on_one_base_answer_without_loading_it_again(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.models import artifact

    alone = [ask(run, QUESTIONS) for run in runs.values()]
    loads = []
    right = artifact.load_model
    monkeypatch.setattr(artifact, "load_model", lambda *a: loads.append(a) or right(*a))
    both = ask(runs["next"], QUESTIONS, others=[runs["before"]])
    assert len(loads) == 1
    assert [answer.tuned for answer in both] == [answer.tuned for answer in alone[0]]
    assert [answer.others[str(runs["before"])] for answer in both] == [answer.tuned for answer in alone[1]]
    assert [answer.base for answer in both] == [answer.base for answer in alone[0]]
    assert all(answer.tuned not in answer.others.values() for answer in both)


def test_an_adapter_of_another_base_is_refused(
    runs: dict[str, Path], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="is not an adapter of the same base as"):
        ask(runs["next"], QUESTIONS, others=[tiny_llama()])
    shutil.copytree(runs["next"] / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny_llama(tied=True))
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="another model"):
        ask(tmp_path / "adapter", QUESTIONS)


def test_an_adapter_of_another_tool_is_asked_and_merged_where_its_base_is_now(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapter, here = tmp_path / "adapter", tiny_llama()
    get_peft_model(base, lora).save_pretrained(adapter)
    for named, said in (
        ("somebody/tiny-bnb-4bit", "is not a folder on this machine"),
        ("/gone/base", "does not exist"),
    ):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        done = nybble("ask", adapter, *QUESTIONS)
        assert done.code in (2, 3)
        assert said in done.err
        assert "--model_name_or_path says where it is now" in done.err
    done = nybble("ask", adapter, *QUESTIONS, "--model", here, "--device", "cpu", "--json")
    assert [answer["prompt"] for answer in done.json["answers"]] == list(QUESTIONS)
    assert all(answer["base"] != answer["tuned"] for answer in done.json["answers"])
    assert [a.tuned for a in ask(adapter, QUESTIONS, {"model_name_or_path": str(here)})] == [
        answer["tuned"] for answer in done.json["answers"]
    ]
    assert Chat(adapter, {"model_name_or_path": str(here)}, max_new_tokens=4).reply(QUESTIONS[0]).n_tokens == 4

    merged = nybble("merge", adapter, "--out", tmp_path / "merged", "--model_name_or_path", here, "--json")
    assert merged.code == 0, merged.err
    assert (merged.json["target"], merged.json["rows"], merged.json["verified"]) == ("original", "built-in", True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"<s>[INST] {q} [/INST] It is. </s>"}) + "\n" for q in QUESTIONS * 4))
    words = ["--model", here, "--dataset", rows, "--dtype", "float32", "--json"]
    merged = nybble("merge", adapter, "--out", tmp_path / "float32", *words)
    assert (merged.json["rows"], merged.json["n_rows"]) == ("given", 8)
    assert merged.json["mean_kl"] < 1e-4


@pytest.mark.parametrize("words", [["--lr", "3"], ["--set", "r=4"], ["--packing"]], ids=str)
def test_settings_that_change_no_answer_are_refused(
    words: list[str], nybble: Callable[..., Any], runs: dict[str, Path]
) -> None:
    done = nybble("ask", runs["next"], "What is two?", *words)
    assert done.code == 2
    assert "changes nothing of a finished training" in done.err


def test_questions_of_a_file(nybble: Callable[..., Any], runs: dict[str, Path], tmp_path: Path) -> None:
    plain, lines = tmp_path / "q.txt", tmp_path / "q.jsonl"
    plain.write_text("\n".join([*QUESTIONS, "", ""]))
    lines.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    assert read_questions(plain) == read_questions(lines) == list(QUESTIONS)
    answers = nybble("ask", runs["next"], "--file", plain, "--json").json["answers"]
    assert [(a["prompt"], a["tuned"]) for a in answers] == [(a.prompt, a.tuned) for a in ask(runs["next"], QUESTIONS)]
    lines.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    done = nybble("ask", runs["next"], "--file", lines)
    assert (done.code, "q.jsonl line 2: has no question" in done.err) == (2, True)
    assert "does not exist" in nybble("ask", runs["next"], "--file", tmp_path / "none").err


def test_a_chat_streams_remembers_switches_and_stops(runs: dict[str, Path]) -> None:
    chat = Chat(runs["next"], others=[runs["before"]], max_new_tokens=64)
    # One by one, as a chat is: an untrained base's words hang on the last bits of a batch.
    two, five = (ask(runs["next"], [question])[0] for question in QUESTIONS)
    before = ask(runs["before"], QUESTIONS[:1])[0]
    pieces: list[str] = []
    reply = chat.reply("What is two?", pieces.append)
    assert reply.stopped
    assert len(pieces) > 2
    assert "".join(pieces).strip() == reply.text == two.tuned
    assert reply.n_tokens > len(pieces)  # the end token says nothing
    chat.reset()
    chat.use(None)
    assert chat.reply("What is two?").text == two.base
    chat.reset()
    chat.use(chat.adapters[1])
    assert chat.reply("What is two?").text == before.tuned
    chat.reset()
    chat.use(chat.adapters[0])
    assert chat.reply("What is five?").text == five.tuned
    with pytest.raises(InputError, match="there is no adapter 'x'; allowed:"):
        chat.use("x")


def test_a_kept_cache_gives_the_answers_of_a_fresh_one(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept, fresh = Chat(runs["next"]), Chat(runs["next"])
    turns = ("What is two?", "What is five?", "What is one?")
    reused: list[int] = []
    forget = Chat._forget

    def counted(self: Chat) -> None:
        reused.append(0)
        forget(self)

    monkeypatch.setattr(Chat, "_forget", counted)
    with_cache = [kept.reply(turn).text for turn in turns]
    assert len(reused) == 1  # for the first turn alone
    without = []
    for turn in turns:
        fresh._forget()
        without.append(fresh.reply(turn).text)
    assert with_cache == without


def test_a_full_context_is_said(runs: dict[str, Path]) -> None:
    chat = Chat(runs["next"], max_new_tokens=8)
    with pytest.raises(InputError, match="start a new conversation"):
        chat.reply("What is two? " * 100)
    chat.reset()
    assert chat.reply("What is two?").text


def test_the_command_reads_lines_and_commands(
    nybble: Callable[..., Any], runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [
        "What is two?",
        "/reset",
        "/base",
        "What is two?",
        "/tuned",
        "/reset",
        "What is five?",
        "/nonsense",
        "/help",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    done = nybble("chat", runs["next"], "--max_new_tokens", "16")
    two, five = ask(runs["next"], QUESTIONS, max_new_tokens=16)
    assert done.code == 0, done.err
    said = [line.strip() for line in done.out.splitlines() if line.strip()]
    assert said[0] == two.tuned
    assert said[-1] == five.tuned
    assert "unknown command /nonsense" in done.err
    assert "/adapter NAME" in done.err
    assert "first after" in done.err
    opening = done.err.splitlines()[0]
    assert opening.startswith(f"{runs['next']}, an adapter on ")
    assert opening.endswith("/help lists the commands, /exit or Ctrl+D leaves")
    assert ", without an adapter\n" in done.err


def test_answers_are_drawn_as_asked(nybble: Callable[..., Any], runs: dict[str, Path]) -> None:
    drawing = ("--temperature", "2.5", "--max_new_tokens", "12", "--json")

    def texts(*more: object) -> list[str]:
        done = nybble("ask", runs["next"], "What is two?", *drawing, *more)
        assert done.code == 0, done.err
        return [done.json["answers"][0]["tuned"], done.json["answers"][0]["base"]]

    first = texts("--seed", 3)
    assert texts("--seed", 3) == first
    assert texts("--seed", 4) != first
    (greedy,) = ask(runs["next"], ["What is two?"], max_new_tokens=12)
    assert texts("--top_p", 1e-9) == [greedy.tuned, greedy.base]  # only the likeliest token is left to draw
    said = [
        Chat(runs["next"], temperature=2.5, seed=seed, max_new_tokens=12).reply("What is two?").text
        for seed in (3, 3, 4)
    ]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--temperature", "-1"), "temperature: got -1.0; allowed is 0 (the likeliest token) or more"),
        (("--temperature", "nan"), "temperature: got nan"),
        (("--temperature", "1", "--top_p", "0"), "top_p: got 0.0; allowed is a number above 0, up to 1"),
        (("--temperature", "1", "--seed", "-3"), "seed: got -3; allowed is a number from 0"),
        (("--seed", "3"), "top_p and seed are for answers that are drawn; give --temperature as well"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(nybble: Callable[..., Any], flags: tuple[str, ...], why: str) -> None:
    for verb in (("ask", "nowhere", "Hello"), ("chat", "nowhere")):
        refused = nybble(*verb, *flags)
        assert refused.code == 2
        assert why in refused.err


def test_chat_as_json_lines_gives_pieces_and_then_the_reply(
    nybble: Callable[..., Any], runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is two?\n/reset\nWhat is five?\n"))
    done = nybble("chat", runs["next"], "--max_new_tokens", "16", "--jsonl")
    lines = [json.loads(line) for line in done.out.splitlines()]
    replies = [line for line in lines if line.get("done")]
    expected = ask(runs["next"], QUESTIONS, max_new_tokens=16)
    assert [reply["answer"] for reply in replies] == [answer.tuned for answer in expected]
    assert [reply["prompt"] for reply in replies] == list(QUESTIONS)
    assert replies[0]["stopped"]
    first = lines[: lines.index(replies[0])]
    assert len(first) > 1
    assert "".join(line["text"] for line in first).strip() == replies[0]["answer"]
