"""From a recipe to a tuned model that answers, by the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble import pipeline
from nybble.storage.checkpoints import list_checkpoints

FAST = ("--learning_rate", "1e-2", "--max_steps", "12", "--logging_steps", "4", "--max_new_tokens", "8")


def train_words(base: Path, rows: Path, out: Path, *more: object) -> list[object]:
    flags = {"model_name_or_path": base, "dataset_name": rows, "output_dir": out, "device": "cpu"}
    named = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return ["train", *named, *FAST, *more]


@pytest.fixture
def train(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> Callable[..., Any]:
    """`train(*words)`: a training of the tiny model on the rows, in the folder `run`."""
    return lambda *more: nybble(*train_words(tiny_llama(), rows_file, tmp_path / "run", *more))


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_every_method_learns_and_leaves_a_whole_run(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "run"
    done = nybble(*train_words(tiny_llama(), rows_file, out, "--method", method, "--json"))
    assert done.code == 0, done.err
    record = done.json
    assert record["evaluation_tuned"]["loss"] < 0.7 * record["evaluation_base"]["loss"]
    assert record == json.loads((out / "run.json").read_text())
    assert record["status"] == "done"
    assert record["rows"]["ledger"]["stop_token_trained_fraction"] == 1.0
    assert {"load", "evaluate_base", "train", "evaluate", "save"} == record["phases"].keys()
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 4, 8, 12]
    assert events[-1]["tokens"] > 0
    weights = out / ("model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors")
    assert weights.is_file()
    assert {"report.html", "report.md", "report.json", "recipe.yaml", "samples.jsonl"} <= {
        p.name for p in out.iterdir()
    }
    assert weights.relative_to(out).as_posix() in json.loads((out / "manifest.json").read_text())


def test_ask_answers_with_base_and_tuned(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert nybble(*train_words(tiny_llama(), rows_file, out, "--max_steps", "120", "--max_new_tokens", "24")).code == 0
    answer = nybble("ask", out, "What is two?", "--json").json["answers"][0]
    assert answer["tuned"].startswith("It is ")
    assert answer["tuned"].endswith(".")  # and then it stops
    assert answer["base"] != answer["tuned"]


def test_the_adapter_is_the_same_function_in_stock_peft(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from nybble.hardware import detect_device
    from nybble.models import find_model, load_adapter, load_model
    from nybble.nn import Linear4bit
    from nybble.recipe import load_recipe

    out = tmp_path / "run"
    assert nybble(*train_words(tiny_llama(), rows_file, out, "--compute_dtype", "float32")).code == 0
    recipe = load_recipe(out / "recipe.yaml")
    ours, _ = load_model(find_model(recipe.model), "qlora", recipe.model, recipe.quantization, detect_device("cpu"))
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)
    for name, module in ours.named_modules():
        if isinstance(module, Linear4bit):
            stock.get_submodule(name).weight.data = module.dequantize()
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    with torch.no_grad():
        expected = load_adapter(ours, out / "adapter")(ids).logits
        got = PeftModel.from_pretrained(stock, out / "adapter")(ids).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_resumed_equals_straight(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    words = train_words(tiny_llama(), rows_file, straight, "--save_steps", "6", "--lora_dropout", "0.1")
    assert nybble(*words).code == 0
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "checkpoint-12")
    shutil.rmtree(resumed / "adapter")
    done = nybble(*train_words(tiny_llama(), rows_file, resumed, *words[-4:], "--resume"))
    assert done.code == 0, done.err
    name = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(resumed / name), load_file(straight / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    steps = [json.loads(line)["step"] for line in (resumed / "events.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--learning_rate", "1e30", "--eval_fraction", "0.2"), "the tuned model's loss is not a number"),
        (("--learning_rate", "1e30", "--eval_fraction", "0"), "the tuned model's loss is not a number"),
        (("--learning_rate", "1e30", "--method", "full"), "the tuned model's loss is not a number"),
    ],
)
def test_a_run_whose_last_update_ends_in_nan_fails_and_leaves_no_weights(
    train: Callable[..., Any], nybble: Callable[..., Any], tmp_path: Path, flags: tuple[str, ...], why: str
) -> None:
    out = tmp_path / "run"
    done = train("--lr_scheduler_type", "constant", "--n_samples", 0, "--max_steps", 1, *flags)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"nybble: {why} after the last step: the training diverged")
    assert "ask it" not in done.out
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["notes"][-1].startswith(why)
    assert not (out / "adapter").exists()
    assert not (out / "model").exists()
    for words in (("merge", "--out", tmp_path / "m"), ("export", "--gguf", tmp_path / "m.gguf"), ("ask", "Hello")):
        refused = nybble(words[0], out, *words[1:])
        assert refused.code == 2
        assert f"the run failed: {why}" in refused.err, refused.err


def test_weights_that_are_not_finite_are_not_written_though_the_loss_is(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a token that no row has."""
    trained_parameters = pipeline.trained_parameters

    def spoiled(model: Any) -> dict[str, torch.Tensor]:
        trained = {name: tensor.clone() for name, tensor in trained_parameters(model).items()}
        next(iter(trained.values()))[0, 0] = torch.inf
        return trained

    monkeypatch.setattr(pipeline, "trained_parameters", spoiled)
    done = train("--max_steps", 1, "--n_samples", 0)
    assert done.code == 2
    assert "nybble: a trained weight is not finite after the last step" in done.err
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_base_whose_loss_is_not_a_number_is_refused_before_the_training(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama(), base)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(3e38)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    done = nybble(*train_words(base, rows_file, tmp_path / "run", "--eval_fraction", "0.2"))
    assert done.code == 2
    assert "the base's loss on the held-out rows is not a number" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (
            ("--learning_rate", "1e30", "--max_grad_norm", "0", "--method", "full"),
            "the (loss|gradient) is not a number",
        ),
        (("--learning_rate", "1e30"), "the (loss|gradient) is not a number"),
        (("--grad_spike", "1.01", "--max_steps", "60"), r"the gradient's norm is \S+, \d times the usual"),
    ],
)
def test_a_bad_batch_stops_at_its_step_and_says_where(
    train: Callable[..., Any], tmp_path: Path, flags: tuple[str, ...], why: str
) -> None:
    out = tmp_path / "run"
    done = train("--save_steps", "1", "--save_total_limit", "99", "--logging_steps", "1", *flags)
    assert done.code == 2
    told = re.fullmatch(
        rf"nybble: {why} at step (\d+) \(rows [\d, ]+\); .*; (there is no|continue from) .*",
        done.err.splitlines()[-1],
    )
    assert told, done.err
    step = int(told[told.lastindex - 1])
    events = [json.loads(line)["step"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events == list(range(1, step))
    saved = list_checkpoints([out / "checkpoints"])
    assert [path.name for path in saved[:1]] == ([f"checkpoint-{step - 1}"] if "continue from" in told[0] else [])
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


def test_the_best_evaluation_ends_the_training_and_is_what_is_saved(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text("load_best_model_at_end: true\nearly_stopping_patience: 2\neval_steps: 5\nwarmup_steps: 1\n")
    words = train_words(tiny_llama(), rows_file, out, "--learning_rate", "5e-2", "--max_steps", "200", "--json")
    done = nybble(words[0], recipe, *words[1:])
    assert done.code == 0, done.err
    best = done.json["best"]
    assert best["metric"] == "eval_loss"
    assert done.json["eval_loss"] == pytest.approx(best["value"], abs=1e-4)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    measured = {event["step"]: event["eval_loss"] for event in events if event["eval_loss"] is not None}
    assert best == {
        "step": min(measured, key=measured.__getitem__),
        "metric": "eval_loss",
        "value": min(measured.values()),
    }
    assert max(measured) == best["step"] + 10 < 200
    stored = out / "checkpoints" / f"checkpoint-{best['step']}" / "adapter_model.safetensors"
    kept, saved = load_file(stored), load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert any(note.startswith(f"stopped early at step {max(measured)} of 200, best") for note in done.json["notes"])


def test_a_signal_saves_and_resume_goes_on(tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [str(w) for w in train_words(tiny_llama(), rows_file, out, "--max_steps", "4000", "--logging_steps", "1")]
    process = subprocess.Popen([sys.executable, "-m", "nybble", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "events.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "--resume" in err.splitlines()[-1]
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    assert list((out / "checkpoints").glob("checkpoint-*/manifest.json"))


def test_generation_stops_where_the_rows_end_a_turn(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """A template may end turns with another token than the model's own end token."""
    turns = [{"role": "user", "content": "What is one?"}, {"role": "assistant", "content": "It is two."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns, "n": i}) + "\n" for i in range(8)))
    template = tmp_path / "ends.jinja"
    header = "{% if add_generation_prompt %}assistant: {% endif %}"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<s>{% endfor %}" + header)
    out, words = (
        tmp_path / "run",
        ("--chat_template", template, "--eval_fraction", "0", "--method", "full", "--max_steps", "40"),
    )
    done = nybble(*train_words(tiny_llama(), tmp_path / "rows.jsonl", out, *words, "--max_new_tokens", "40", "--json"))
    assert done.code == 0, done.err
    assert done.json["rows"]["ledger"]["stop_tokens"] == [1]
    assert json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    answer = nybble("ask", out, "What is one?", "--json").json["answers"][0]
    assert answer["tuned"] == "It is two."
