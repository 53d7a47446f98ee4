"""`nybble plan` as it is typed, and what `train` makes of a plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

KEYS = {
    "device",
    "budget_bytes",
    "fits",
    "phases",
    "recompute_layers",
    "micro_batch",
    "flops_per_step",
    "step_seconds",
    "total_seconds",
    "trainable_parameters",
    "total_parameters",
    "cheapest_changes",
}
SMALL = ("--model", "qwen2.5-0.5b", "--max_length", "256", "--device-profile", "rtx4090")


def train_words(base: Path, rows: Path, out: Path) -> list[object]:
    flags = {"model": base, "dataset": rows, "output_dir": out, "max_steps": 2, "device": "cpu", "max_new_tokens": 8}
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture(autouse=True)
def _cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Callable[[Path], AbstractContextManager[None]]
) -> Iterator[None]:
    """Where it is when nothing names it."""
    monkeypatch.delenv("NYBBLE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with machine(tmp_path / "cache" / "nybble"):
        yield


def test_a_known_shape_is_planned_without_network_or_weights(nybble: Callable[..., Any]) -> None:
    done = nybble("plan", *SMALL, "--max_steps", "10", "--json")
    assert done.code == 0, done.err
    plan = done.json
    assert plan.keys() >= KEYS
    assert plan["total_parameters"] - plan["trainable_parameters"] == 494_032_768  # as its model card says
    names = [phase["name"] for phase in plan["phases"]]
    assert names == ["load", "first step", "steady step", "longest batch", "evaluation", "checkpoint", "merge"]
    for phase in plan["phases"]:
        assert sum(phase["parts"].values()) == phase["peak_bytes"] <= plan["budget_bytes"] == 24_000_000_000
    assert plan["fits"]
    assert plan["recompute_layers"] == 0
    assert plan["micro_batch"] == 4
    assert plan["total_seconds"] == pytest.approx(10 * plan["step_seconds"])
    assert plan["device"]["is_estimate"]
    assert any("rows are not known" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("model", "parameters", "gigabytes"),
    [
        ("gpt-oss-20b", 20_914_757_184, 12.6),
        pytest.param("qwen3-30b-a3b", 30_532_122_624, 16.7, marks=pytest.mark.nightly),
    ],
)
def test_experts_are_planned_in_4_bits(
    nybble: Callable[..., Any], model: str, parameters: int, gigabytes: float
) -> None:
    """At 4.127 bits a weight, with embeddings, head, routers and biases in 16."""
    words = ("--max_length", "256", "--target_modules", "q_proj,v_proj", "--attn_implementation", "eager")
    plan = nybble("plan", "--model", model, *words, "--device-profile", "mi300x", "--json").json
    assert plan["total_parameters"] - plan["trainable_parameters"] == parameters
    load = next(phase for phase in plan["phases"] if phase["name"] == "load")
    assert load["parts"]["weights"] == pytest.approx(gigabytes * 1e9, rel=0.01)


def test_the_budget_of_a_plan_is_what_was_said(nybble: Callable[..., Any], tiny_llama: Callable[..., Path]) -> None:
    words = ("--model", tiny_llama(), "--max_length", "32", "--device", "cpu", "--json")
    own = nybble("plan", *words).json
    assert not any("budget" in note for note in own["notes"])
    beyond = nybble("plan", *words, "--memory", "900TiB").json
    assert beyond["budget_bytes"] == 900 * 2**40
    assert any("the budget is more than the" in note and "has free now" in note for note in beyond["notes"])
    among = nybble("plan", *words, "--memory", "900TiB", "--processes", "2").json
    assert among["plan"]["budget_bytes"] == 900 * 2**40


def test_a_training_plans_with_what_this_machine_has(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    words = train_words(tiny_llama(), rows_file, tmp_path / "run")
    done = nybble("train", *words, "--memory_budget", "900TiB", "--json")
    assert done.json["plan"]["budget_bytes"] < 2**50


def test_a_smaller_budget_means_more_recomputation_and_more_time(nybble: Callable[..., Any]) -> None:
    ample, tight = (nybble("plan", *SMALL, "--memory", memory, "--json").json for memory in ("8GB", "1600MB"))
    assert max(phase["peak_bytes"] for phase in tight["phases"]) <= 1_600_000_000
    assert tight["recompute_layers"] > ample["recompute_layers"] == 0 or tight["micro_batch"] < ample["micro_batch"]
    assert tight["step_seconds"] > ample["step_seconds"]


def test_what_does_not_fit_ends_with_3_and_the_cheapest_changes(nybble: Callable[..., Any]) -> None:
    words = ("plan", "--model", "qwen2.5-0.5b", "--method", "full", "--device-profile", "rtx4090", "--memory", "4GB")
    done = nybble(*words, "--json")
    assert done.code == 3
    assert "4.00 GB" in done.err
    assert "--method" in done.err
    plan = json.loads(done.out)
    assert not plan["fits"]
    changes = {(c["setting"], c["value"]): c for c in plan["cheapest_changes"]}
    assert changes["method", "qlora"]["fits"]
    assert changes["method", "qlora"]["peak_bytes"] <= 4_000_000_000
    peak = max(phase["peak_bytes"] for phase in plan["phases"])
    assert all(c["peak_bytes"] < peak for c in plan["cheapest_changes"])
    # What is promised holds: with the change it does fit.
    assert nybble(*words[:3], "--method", "qlora", *words[5:]).code == 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--model", "{tmp}/lacking"), 2, "leave no linear layer"),
        (("--target_modules", "nothing"), 2, "nothing"),
    ],
)
def test_wrong_input_is_one_line(
    nybble: Callable[..., Any], tmp_path: Path, words: tuple[str, str], code: int, text: str
) -> None:
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 0}')
    done = nybble("plan", *SMALL, *(word.format(tmp=tmp_path) for word in words))
    assert done.code == code
    assert text in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_rows_that_cannot_be_read_are_said_and_max_length_is_planned_for(
    nybble: Callable[..., Any], tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    words = ("--model", tiny_llama(), "--dataset", tmp_path / "none.jsonl", "--max_length", "64", "--device", "cpu")
    done = nybble("plan", *words, "--json")
    assert done.code == 0, done.err
    assert any("the rows cannot be read" in note for note in done.json["notes"])
    assert any("64 tokens" in note for note in done.json["notes"])


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(
    nybble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.planning import extrapolate

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent control flow")

    monkeypatch.setattr(extrapolate, "run_steps", fail)
    refused = nybble("plan", *SMALL, "--json")
    assert refused.code == 2
    assert "qwen2 cannot be traced (data-dependent control flow), so no plan can be made" in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_train_refuses_what_cannot_fit_unless_forced(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    words = train_words(tiny_llama(), rows_file, tmp_path / "run")
    refused = nybble("train", *words, "--memory_budget", "1MB")
    assert refused.code == 3
    assert "--force" in refused.err
    assert not (tmp_path / "run").exists()
    forced = nybble("train", *words, "--memory_budget", "1MB", "--force", "--json")
    assert forced.code == 0, forced.err
    record = forced.json
    assert not record["plan"]["fits"]
    assert record["plan"]["recompute_layers"] == record["plan"]["n_layers"] == 2


def test_a_run_keeps_predicted_beside_measured(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    done = nybble("train", *train_words(tiny_llama(), rows_file, tmp_path / "run"), "--json")
    assert done.code == 0, done.err
    assert "fits:" in done.err
    assert "recomputed" in done.err
    for name, phase in done.json["phases"].items():
        assert phase["predicted_bytes"], name
    assert done.json["plan"].keys() >= KEYS
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| phase | predicted |" in report
    shutil.rmtree(tmp_path / "run")


def test_what_processes_take_and_send(nybble: Callable[..., Any], tiny_llama: Callable[..., Path]) -> None:
    def planned(*words: object) -> Any:
        settings = ("--model", tiny_llama(), "--train_batch_size", 4, "--max_length", 32, "--device", "cpu")
        outcome = nybble("plan", *settings, *words, "--json")
        assert outcome.code == 0, outcome.err
        return outcome.json

    alone, ddp = planned("--processes", 1), planned("--processes", 2)
    gradients = 4 * alone["plan"]["trainable_parameters"]
    assert alone["sent_bytes_per_step"] == 0
    assert ddp["sent_bytes_per_step"] == gradients  # 2 (N - 1) / N of them
    assert "sharding is not worth it" in ddp["advice"]
    fsdp = planned("--processes", 2, "--distributed", "fsdp")
    parts, whole = ({p["name"]: p["parts"] for p in made["plan"]["phases"]}["steady step"] for made in (fsdp, alone))
    for name in ("weights", "adapters", "optimizer"):
        assert parts[name] == whole[name] // 2, name
    tables = 2 * 128 * 64 * 2  # embeddings and head in bfloat16: for the forward pass alone
    sent = (2 * (whole["weights"] + whole["adapters"]) - tables + gradients) / 2
    layer = (whole["weights"] + whole["adapters"] - tables) / 2
    adapters = whole["adapters"] / 2
    # At the highest moment, in a backward pass: a layer, the next as it comes, gradients as they are sent.
    assert parts["gathered"] == pytest.approx(2 * layer + adapters, rel=0.01)
    assert fsdp["sent_bytes_per_step"] == pytest.approx(sent, rel=0.01)
    assert fsdp["plan"]["rows_per_step"] == 4
    assert fsdp["plan"]["step_rule"] == "4 rows per step, fixed by train_batch_size: 2 rows x 1 x 2 processes"
    added = planned("--processes", 2, "--train_batch_size", "none")
    assert added["plan"]["rows_per_step"] == 8
    assert added["plan"]["step_rule"].startswith("8 rows per step: per_device_train_batch_size 4 x ")
    groups = planned("--processes", 4, "--distributed", "fsdp", "--fsdp_shards", 2)
    mine = {p["name"]: p["parts"] for p in groups["plan"]["phases"]}["steady step"]
    assert mine["weights"] == whole["weights"] // 2
    assert groups["sent_bytes_per_step"] == pytest.approx(sent + gradients / 2, rel=0.01)  # its half, over both groups
    away = planned("--processes", 2, "--distributed", "fsdp", "--fsdp_cpu_offload", "true")
    left = {p["name"]: p["parts"] for p in away["plan"]["phases"]}["steady step"]
    assert not any(left.get(name) for name in ("weights", "adapters", "optimizer", "gradients"))
    assert left["gathered"] == parts["gathered"] * 3 // 2  # whole, and the half that came from the host for it
    held = (whole["weights"] + whole["adapters"] + whole["optimizer"] + gradients) / 2
    assert away["plan"]["host_bytes"] == pytest.approx(held, rel=0.01)
    assert away["step_seconds"] >= fsdp["step_seconds"]
    slow, fast = (planned("--processes", 2, "--distributed", "fsdp", "--link-rate", rate) for rate in ("1kB", "1TB"))
    assert slow["step_seconds"] == pytest.approx(slow["sent_bytes_per_step"] / 1000)
    assert slow["efficiency"] < 0.01
    assert fast["efficiency"] == 1.0
    for wrong in ((3, "--train_batch_size", 4), (4, "--distributed", "fsdp", "--fsdp_shards", 3)):
        assert nybble("plan", "--model", tiny_llama(), "--processes", *wrong).code == 2


CARDS = {  # dense bfloat16 or float16 TFLOP/s, GB/s and GB of their data sheets
    "a100": (312, 2039, 80),
    "h100": (989, 3350, 80),
    "l40s": (362.1, 864, 48),
    "rtx3090": (71, 936, 24),
    "t4": (65, 300, 16),
    "w7900": (122.6, 864, 48),
    "r9700": (191, 640, 32),
    "mi300a": (980.6, 5300, 128),
}


def test_cards_that_people_have_can_be_planned_for(nybble: Callable[..., Any], tiny_llama: Callable[..., Path]) -> None:
    from nybble.planning import PROFILES

    for card, (teraflops, gigabytes_per_second, gigabytes) in CARDS.items():
        profile = PROFILES[card]
        rates = (profile.flops_per_second, profile.bytes_per_second)
        assert rates == pytest.approx((0.5e12 * teraflops, 0.7e9 * gigabytes_per_second)), card
        assert (profile.memory_bytes, profile.is_estimate) == (gigabytes * 10**9, True), card
    done = nybble("plan", "--model", tiny_llama(), "--device-profile", "T4", "--max_length", 32, "--json")
    assert done.code == 0, done.err
    assert done.json["budget_bytes"] == 16_000_000_000
    assert "T4 has no bfloat16: computing in float16 instead" in done.json["notes"]


def test_links_of_a_mesh_work_at_once() -> None:
    from nybble.planning import PROFILES

    mesh, bus = PROFILES["mi300x"].links, PROFILES["rtx4090"].links
    assert [mesh.rate(n) / 1e9 for n in (1, 2, 4, 8, 16)] == [48, 48, 144, 336, 336]
    assert [bus.rate(n) / 1e9 for n in (1, 2, 8)] == [12, 12, 12]
