"""A training by several processes is the training of one."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.storage.checkpoints import list_checkpoints

GROUPS = ("--distributed", "fsdp", "--fsdp_shards", 2)
OFFLOADED = ("--distributed", "fsdp", "--fsdp_cpu_offload", "true")
Launch = Callable[..., Any]


# What evaluations decide, noise on the embeddings, and two rates.
BEST: tuple[object, ...] = ("--eval_fraction", 0.25, "--eval_strategy", "epoch", "--load_best_model_at_end", "true")
BEST += ("--neftune_noise_alpha", 5, "--loraplus_lr_ratio", 2)


def _left(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events = [event for event in events if event["loss"] is not None]  # of a step, not of an evaluation
    return load_file(run / "adapter" / "adapter_model.safetensors"), events


@pytest.mark.parametrize(
    ("count", "split", "tied"),
    [
        pytest.param(4, (), False, marks=pytest.mark.nightly),
        (2, ("--lora_dropout", 0.2, *BEST), False),
        pytest.param(2, ("--distributed", "fsdp"), False, marks=pytest.mark.nightly),
        (2, ("--distributed", "fsdp"), True),
        pytest.param(2, OFFLOADED, False, marks=pytest.mark.nightly),
        (4, GROUPS, True),
        pytest.param(2, ("--init_lora_weights", "loftq"), False, marks=pytest.mark.nightly),
        pytest.param(2, ("--distributed", "fsdp", *BEST), True, marks=pytest.mark.nightly),
    ],
)
def test_several_processes_learn_what_one_does(
    launch: Launch,
    words: list[object],
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    count: int,
    split: tuple[object, ...],
    tied: bool,
) -> None:
    words = [*words, "--model", tiny_llama(tied=tied)]  # embeddings and head: one weight, or units of their own
    # Masks of dropout follow the micro-batches: one process takes them in the same size.
    alone = ("--per_device_train_batch_size", 4 // count) if split else ()
    assert launch(1, [*words, *split, *alone, "--output_dir", tmp_path / "one"]).codes == (0,)
    outcome = launch(count, [*words, *split, "--output_dir", tmp_path / "many"])
    assert outcome.codes == (0,) * count, outcome.err
    (expected, log), (found, log_of_many) = _left(tmp_path / "one"), _left(tmp_path / "many")
    assert [e["tokens"] for e in log_of_many] == [e["tokens"] for e in log]
    assert [e["loss"] for e in log_of_many] == pytest.approx([e["loss"] for e in log], rel=1e-5)
    assert [e["grad_norm"] for e in log_of_many] == pytest.approx([e["grad_norm"] for e in log], rel=1e-4)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name
    assert outcome.err[1:] == ("",) * (count - 1)  # the others are silent
    if split in (("--distributed", "fsdp"), GROUPS):
        _check_shares(tmp_path / "many", count)


def test_without_train_batch_size_each_process_adds_its_rows_to_a_step(
    launch: Launch, words: list[object], tmp_path: Path
) -> None:
    """As in transformers: rows of a step are per_device_train_batch_size x gradient_accumulation_steps x processes."""
    words = [*words, "--train_batch_size", "none", "--lora_dropout", 0.2, "--per_device_train_batch_size", 2]
    assert launch(1, [*words, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one"]).codes == (0,)
    outcome = launch(2, [*words, "--output_dir", tmp_path / "many"])
    assert outcome.codes == (0, 0), outcome.err
    said = "4 rows per step: per_device_train_batch_size 2 x gradient_accumulation_steps 1 x 2 processes"
    assert said in outcome.err[0]
    record = json.loads((tmp_path / "many" / "run.json").read_text())
    assert (record["plan"]["rows_per_step"], record["plan"]["step_rule"]) == (4, said)
    (expected, log), (found, log_of_many) = _left(tmp_path / "one"), _left(tmp_path / "many")
    assert len(log) == 2 * 6  # two epochs of 23 rows
    assert [e["tokens"] for e in log_of_many] == [e["tokens"] for e in log]
    assert [e["loss"] for e in log_of_many] == pytest.approx([e["loss"] for e in log], rel=1e-5)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name


def test_another_number_of_processes_resumes_only_the_same_steps(
    launch: Launch, words: list[object], tmp_path: Path
) -> None:
    words = [*words, "--train_batch_size", "none", "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "run"]
    assert launch(2, [*words, "--max_steps", 5]).codes == (0, 0)
    refused = launch(1, [*words, "--max_steps", 5, "--resume"])
    assert refused.codes == (2,)
    assert "rows per step (was 4, is 2; of all processes together, --train_batch_size 4 keeps it)" in refused.lines[0]
    resumed = launch(1, [*words, "--max_steps", 5, "--resume", "--train_batch_size", 4])
    assert resumed.codes == (0,), resumed.err
    assert "4 rows per step, fixed by train_batch_size: 2 rows x 2 x 1 process" in resumed.err[0]


def _check_shares(run: Path, count: int) -> None:
    """Each process held half of the weights, as planned."""
    record = json.loads((run / "run.json").read_text())
    held, packed = record["model"]["held_bytes"], record["model"]["packed_bytes"]
    assert len(held) == count
    assert packed / 2 < max(held) < 0.55 * sum(held) * 2 / count
    planned = next(phase["parts"] for phase in record["plan"]["phases"] if phase["name"] == "steady step")
    assert planned["weights"] + planned["adapters"] == pytest.approx(max(held), rel=0.05)


@pytest.mark.parametrize(
    ("tied", "depth"),
    [
        (False, "never"),
        (True, "always"),
        pytest.param(False, "always", marks=pytest.mark.nightly),
        pytest.param(True, "never", marks=pytest.mark.nightly),
    ],
)
def test_each_process_of_a_run_in_shards_takes_what_was_planned(
    launch: Launch,
    words: list[object],
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    tied: bool,
    depth: str,
) -> None:
    def count(rank: int) -> None:
        import nybble.pipeline
        from nybble.training.checkpoint import CheckpointWriter

        storages = importlib.import_module("bench.memory.distributed").Storages
        train_model, save = nybble.pipeline.train_model, CheckpointWriter.save
        most: list[int] = []  # before the first checkpoint, before each later one, at the end

        def counted(model: Any, *rest: Any, **parts: Any) -> Any:
            with storages([*model.parameters(), *model.buffers()]) as seen:

                def save_then(self: Any, *given: Any) -> None:
                    most.append(seen.most)
                    save(self, *given)

                CheckpointWriter.save = save_then  # type: ignore[method-assign]  # in a process of its own
                result = train_model(model, *rest, **parts)
            (tmp_path / f"most-{rank}").write_text(json.dumps([most[0], seen.most]))
            return result

        nybble.pipeline.train_model = counted

    model = tiny_llama(tied=tied, num_hidden_layers=4, hidden_size=128, intermediate_size=256, vocab_size=1024)
    rows = tmp_path / "alike.jsonl"  # else the longest of them may not meet
    rows.write_text(24 * (json.dumps({"text": "<s>[INST] What is two? What is four?[/INST] It is four</s>"}) + "\n"))
    words = [*words, "--model", model, "--dataset", rows, "--gradient_checkpointing", depth]
    words += ["--r", 4, "--compute_dtype", "bfloat16", "--distributed", "fsdp", "--output_dir", tmp_path / "run"]
    outcome = launch(2, words, setup=count)
    assert outcome.codes == (0, 0), outcome.err
    counts = [json.loads((tmp_path / f"most-{rank}").read_text()) for rank in range(2)]
    phases = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["phases"]
    live = {p["name"]: p["peak_bytes"] - p["parts"]["context"] - p["parts"]["allocator"] for p in phases}
    steps, whole_run = (max(of) for of in zip(*counts, strict=True))
    assert max(live["steady step"], live["longest batch"]) == pytest.approx(steps, rel=0.05)
    assert live["checkpoint"] > 0.95 * whole_run  # copies may be written before the next step is at its highest


@pytest.mark.parametrize(
    ("count", "how"),
    [
        pytest.param(2, ("--distributed", "fsdp"), id="shards"),
        pytest.param(2, OFFLOADED, id="offloaded", marks=pytest.mark.nightly),
        pytest.param(4, GROUPS, id="groups", marks=pytest.mark.nightly),
    ],
)
def test_a_run_of_which_a_process_was_killed_goes_on_to_the_same_bits(
    launch: Launch, words: list[object], tmp_path: Path, count: int, how: tuple[object, ...]
) -> None:
    words = [*words, *how]

    def die(rank: int) -> None:
        from nybble.training.state import TrainState

        finish = TrainState.finish_step

        def kill(self: TrainState, *given: Any, **named: Any) -> None:
            finish(self, *given, **named)
            if rank == 1 and self.step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        TrainState.finish_step = kill  # type: ignore[method-assign]  # in a process of its own

    assert launch(count, [*words, "--output_dir", tmp_path / "whole"]).codes == (0,) * count
    launcher = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torn = launch(count, [*words, "--output_dir", tmp_path / "torn"], setup=die, launcher=launcher)
    assert torn.codes == (3, -signal.SIGKILL, *(3,) * (count - 2))
    assert re.search("another process of the run is lost .* --resume", torn.lines[0])
    assert [path.name for path in list_checkpoints([tmp_path / "torn" / "checkpoints"])] == ["checkpoint-4"]
    shutil.copytree(tmp_path / "torn", tmp_path / "alone")
    # As torchrun begins anew: the same words, no --resume.
    again = launch(count, [*words, "--output_dir", tmp_path / "torn"], launcher=launcher)
    assert again.codes == (0,) * count, again.err
    (expected, log), (found, log_of_torn) = _left(tmp_path / "whole"), _left(tmp_path / "torn")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [(e["loss"], e["tokens"]) for e in log_of_torn] == [(e["loss"], e["tokens"]) for e in log]
    assert launch(1, [*words, "--output_dir", tmp_path / "alone", "--resume"]).codes == (0,)
    alone, log_of_one = _left(tmp_path / "alone")
    assert [e["tokens"] for e in log_of_one] == [e["tokens"] for e in log]
    for name, tensor in expected.items():
        assert (alone[name] - tensor).abs().max() < 1e-4, name
    assert _tensors(tmp_path / "torn") == _tensors(tmp_path / "alone")


def _tensors(run: Path) -> dict[str, tuple[int, ...]]:
    """Files of the newest checkpoint, and the names and shapes in them, but for the generators of each process."""
    newest = list_checkpoints([run / "checkpoints"])[0]
    found: dict[str, tuple[int, ...]] = {file.name: () for file in newest.iterdir()}
    for file in newest.glob("*.safetensors"):
        found |= {f"{file.name} {name}": tuple(tensor.shape) for name, tensor in load_file(file).items()}
    return {name: shape for name, shape in found.items() if " generators." not in name}


@pytest.mark.parametrize("distributed", [pytest.param("ddp", marks=pytest.mark.nightly), "fsdp"])
def test_held_out_rows_are_shared_and_each_counts_once(
    launch: Launch, words: list[object], tmp_path: Path, distributed: str
) -> None:
    def stop_early(_rank: int) -> None:
        from nybble import loading

        found = loading.stop_at  # at half of the tokens: some batches have their answers long before others
        loading.stop_at = lambda model, _tokens: found(model, range(64))  # type: ignore[attr-defined]

    asked, few = tmp_path / "asked.jsonl", ("--per_device_eval_batch_size", 2, "--max_new_tokens", 12, "--max_steps", 2)
    rows = [{"prompt": f"What is {'two ' * (1 + i)}?", "completion": "four", "answer": "four"} for i in range(9)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*words, *few, "--eval_dataset_name", asked, "--chat_template", "inst", "--n_samples", 5]
    assert launch(1, [*words, "--output_dir", tmp_path / "one"], setup=stop_early).codes == (0,)
    # 9 rows in batches of 2 are 5 batches: 4 processes have one or two each, and the last of them are repeated.
    outcome = launch(4, [*words, "--distributed", distributed, "--output_dir", tmp_path / "many"], setup=stop_early)
    assert outcome.codes == (0,) * 4, outcome.err
    one, many = (
        [json.loads(line) for line in (tmp_path / run / "held_out.jsonl").read_text().splitlines()]
        for run in ("one", "many")
    )
    assert len(many) == 9
    assert [row["base"] for row in many] == [row["base"] for row in one]  # the same batches: the same bits
    assert [row["tuned"]["loss"] for row in many] == pytest.approx([row["tuned"]["loss"] for row in one], rel=1e-4)
    samples = [(tmp_path / run / "samples.jsonl").read_text().splitlines() for run in ("one", "many")]
    assert len(samples[1]) == 5
    assert samples[0] == samples[1]


def test_peaks_are_those_of_the_process_that_takes_most(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def take_more(rank: int) -> None:
        from nybble import hardware

        found = hardware.PeakMemory.peak_bytes
        hardware.PeakMemory.peak_bytes = lambda self: found(self) + rank * 10**12  # type: ignore[method-assign]

    assert launch(2, [*words, "--max_steps", 2, "--output_dir", tmp_path / "run"], setup=take_more).codes == (0, 0)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert record["processes"]["count"] == 2
    assert record["processes"]["distributed"] == "ddp"
    first, second = record["processes"]["peak_bytes"]
    assert first < 10**12 < second == record["peak_bytes"]
    assert all(phase["measured_bytes"] > 10**12 for phase in record["phases"].values())
    assert all(event["peak_bytes"] > 10**12 for event in events)
    assert "2, ddp" in (tmp_path / "run" / "report.md").read_text()


def test_processes_on_a_cpu_share_its_memory(launch: Launch, words: list[object], tmp_path: Path) -> None:
    assert launch(2, [*words, "--max_steps", 2, "--output_dir", tmp_path / "run"]).codes == (0, 0)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["plan"]["budget_bytes"] < 0.6 * record["device"]["total_bytes"]


def test_batches_are_dealt_out_evenly_and_no_row_twice() -> None:
    from nybble.data import FlatBatch, Groups
    from nybble.data.encode import Example
    from nybble.recipe import TrainingSection
    from nybble.run.processes import Processes
    from nybble.training.dataloader import StepLoader, epoch_order

    for n_rows, size, steps, count in ((10, 2, 1, 2), (10, 1, 2, 4), (9, 2, 3, 4), (8, 4, 2, 1), (3, 4, 1, 2)):
        rows = Groups([Example([5, 6], [5, 6], 1, 1, 0, (2,), 0, 0, False, number) for number in range(n_rows)])
        section = TrainingSection(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        loaders = [StepLoader(rows, FlatBatch(), section, Processes(rank, count)) for rank in range(count)]
        drawn = []
        for step in range(loaders[0].steps_an_epoch):
            shares = [loader.micro_batches_of(step) for loader in loaders]
            assert len({len(share) for share in shares}) == 1  # as many in each process
            for turn in zip(*shares, strict=True):
                drawn += [row for batch in turn for row in batch.rows]
                assert all(len(batch.rows) <= size for batch in turn)
                assert all(batch.n_learned == len(batch.rows) for batch in turn)
        assert drawn == [rows.rows(number)[0] for number in epoch_order(n_rows, section.seed, 0)]


def test_batches_to_evaluate_are_dealt_out_and_none_is_left() -> None:
    from nybble.run.processes import Processes
    from nybble.training.evaluate import _share

    for n_batches, count in ((5, 4), (8, 4), (3, 4), (7, 1), (0, 2)):
        batches = [[number] for number in range(n_batches)]
        shares = [list(_share(batches, Processes(rank, count))) for rank in range(count)]
        assert {len(share) for share in shares} == {-(-n_batches // count)}  # as many in each, and no more than needed
        assert sorted({number for share in shares for (number,) in share}) == list(range(n_batches))
