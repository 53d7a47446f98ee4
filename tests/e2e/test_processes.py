"""A training by several processes is the training of one."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.checkpoints import list_checkpoints
from nybble.cli.main import run as run_nybble

_SECONDS = 120  # until a process that does not end fails its test
GROUPS = ("--distributed", "fsdp", "--fsdp_shards", 2)
OFFLOADED = ("--distributed", "fsdp", "--fsdp_cpu_offload", "true")
ROWS = 23  # of which steps of 4 leave 3 in the last, which neither 2 nor 4 processes share evenly


@dataclass(frozen=True)
class Outcome:
    """How the processes of a run ended, by rank."""

    codes: tuple[int | None, ...]
    err: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The errors."""
        return [line for text in self.err for line in text.splitlines() if line.startswith("nybble: ")]


Launch = Callable[..., Outcome]


@pytest.fixture
def launch(tmp_path: Path, found_paths: Path) -> Launch:
    """`launch(2, words)`: `nybble words` in two processes, named as torchrun does it.

    They are forked from this one, which has read the libraries already. `launcher`: its store, as torchrun keeps one.
    """

    def call(
        count: int,
        words: Sequence[object],
        own: Mapping[int, Sequence[object]] | None = None,
        setup: Callable[[int], None] = lambda _rank: None,
        launcher: torch.distributed.TCPStore | None = None,
        **variables: str,
    ) -> Outcome:
        port = launcher.port if launcher else _free_port()
        context = multiprocessing.get_context("fork")
        started = []
        for rank in range(count):
            named: dict[str, object] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
            }
            named |= {"LOCAL_WORLD_SIZE": count, "MASTER_PORT": str(port)}
            named |= {"TORCHELASTIC_USE_AGENT_STORE": launcher is not None}
            environment = {**{k: str(v) for k, v in named.items()}, **variables}
            ours = [str(word) for word in (*words, *((own or {}).get(rank, ())))]
            file = tmp_path / f"err-{rank}"
            started.append(context.Process(target=_process, args=(rank, environment, ours, file, setup)))
        for process in started:
            process.start()
        for process in started:
            process.join(_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        return Outcome(
            tuple(process.exitcode for process in started),
            tuple((tmp_path / f"err-{rank}").read_text() for rank in range(count)),
        )

    return call


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _process(
    rank: int, environment: dict[str, str], words: list[str], file: Path, setup: Callable[[int], None]
) -> None:
    os.environ.update(environment)
    with file.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        setup(rank)
        code = run_nybble(words)
        sys.stderr.flush()
    os._exit(code)


@pytest.fixture
def words(tiny_llama: Callable[..., Path], tmp_path: Path) -> list[object]:
    """A training of three epochs in float32, where rows differ in length."""
    rows = tmp_path / "rows.jsonl"
    texts = [f"<s>[INST] {'What is two? ' * (1 + i % 4)}[/INST] It is {'four ' * (1 + i % 3)}</s>" for i in range(ROWS)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        "model": tiny_llama(),
        "dataset": rows,
        "eval_fraction": 0,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "compute_dtype": "float32",
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 4,
        "save_total_limit": 9,
        "dataset_num_proc": 1,
        "device": "cpu",
        "report_to": "none",
    }
    return ["train", *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _left(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return load_file(run / "adapter" / "adapter_model.safetensors"), events


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Read before the processes are forked, so that none of them has to."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import nybble.pipeline
    import nybble.training.steps  # noqa: F401


@pytest.mark.parametrize(
    ("count", "split", "tied"),
    [
        (4, (), False),
        (2, ("--lora_dropout", 0.2), False),
        (2, ("--distributed", "fsdp"), False),
        (2, ("--distributed", "fsdp"), True),
        (2, OFFLOADED, False),
        (4, GROUPS, True),
        (2, ("--init_lora_weights", "loftq"), False),
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
    alone = ("--per_device_train_batch_size", 4 // count, "--gradient_accumulation_steps", count) if split else ()
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


def _check_shares(run: Path, count: int) -> None:
    """Each process held half of the weights, as planned."""
    record = json.loads((run / "run.json").read_text())
    held, packed = record["model"]["held_bytes"], record["model"]["packed_bytes"]
    assert len(held) == count
    assert packed / 2 < max(held) < 0.55 * sum(held) * 2 / count
    planned = next(phase["parts"] for phase in record["plan"]["phases"] if phase["name"] == "steady step")
    assert planned["weights"] + planned["adapters"] == pytest.approx(max(held), rel=0.05)


@pytest.mark.parametrize("depth", ["never", "always"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_each_process_of_a_run_in_shards_takes_what_was_planned(
    launch: Launch,
    words: list[object],
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
    depth: str,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))

    def count(rank: int) -> None:
        import nybble.pipeline
        from nybble.training.resuming import ResumableTrainer

        storages = importlib.import_module("distributed").Storages
        train_model, save = nybble.pipeline.train_model, ResumableTrainer._save_checkpoint
        most: list[int] = []  # before the first checkpoint, before each later one, at the end

        def counted(model: Any, *rest: Any) -> Any:
            with storages([*model.parameters(), *model.buffers()]) as seen:

                def save_then(self: Any, *given: Any) -> None:
                    most.append(seen.most)
                    save(self, *given)

                ResumableTrainer._save_checkpoint = save_then  # type: ignore[method-assign]  # in a process of its own
                result = train_model(model, *rest)
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
    [(2, ("--distributed", "fsdp")), (2, OFFLOADED), (4, GROUPS)],
    ids=["shards", "offloaded", "groups"],
)
def test_a_run_of_which_a_process_was_killed_goes_on_to_the_same_bits(
    launch: Launch, words: list[object], tmp_path: Path, count: int, how: tuple[object, ...]
) -> None:
    words = [*words, *how]

    def die(rank: int) -> None:
        from nybble.training.callbacks import Stops

        def kill(self: Stops, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank == 1 and state.global_step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        Stops.on_step_end = kill  # type: ignore[method-assign]  # in a process of its own

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


@pytest.mark.parametrize("setting", [("--method", "full"), ("--optim", "adafactor"), ("--init_lora_weights", "loftq")])
def test_what_does_not_work_in_shards_is_said(
    launch: Launch, words: list[object], tmp_path: Path, setting: tuple[str, str]
) -> None:
    outcome = launch(2, [*words, "--output_dir", tmp_path / "run", "--distributed", "fsdp", *setting])
    assert outcome.codes == (2, 2)
    assert all("distributed: fsdp does not work with" in line for line in outcome.lines)


WRONG: dict[str, tuple[list[object], dict[int, list[object]], str]] = {
    "batch": (["--per_device_train_batch_size", 3], {}, "the 3 rows of a step .* cannot be shared by 2 processes"),
    "recipes": ([], {1: ["--learning_rate", 0.5]}, "setting training.learning_rate is 0.01 in process 0 and 0.5"),
    "groups": (["--distributed", "fsdp", "--fsdp_shards", 3], {}, "2 processes do not divide into groups of that size"),
    "probe": (["--learning_rate", "probe"], {}, "probe works in one process"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_one_process_refuses_all_refuse(launch: Launch, words: list[object], tmp_path: Path, case: str) -> None:
    more, own, message = WRONG[case]
    outcome = launch(2, [*words, *more, "--output_dir", tmp_path / "run"], own)
    assert outcome.codes == (2, 2)
    assert [bool(re.search(message, line)) for line in outcome.lines] == [True, True], outcome.lines
    assert not (tmp_path / "run").exists()


def test_versions_must_be_the_same(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def other_version(rank: int) -> None:
        from nybble import job

        found = job.software_versions()
        job.software_versions = lambda: {**found, "torch": f"2.{rank}"}  # type: ignore[attr-defined]

    outcome = launch(2, [*words, "--output_dir", tmp_path / "run"], setup=other_version)
    assert outcome.codes == (2, 2)
    assert all("the version of torch is '2.0' in process 0 and '2.1' in process 1" in line for line in outcome.lines)


def test_the_folder_must_be_shared(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def elsewhere(rank: int) -> None:
        from nybble import job

        job._SECONDS_TO_APPEAR = 0
        (tmp_path / str(rank)).mkdir()
        os.chdir(tmp_path / str(rank))

    outcome = launch(2, [*words, "--output_dir", "run"], setup=elsewhere)
    assert outcome.codes == (2, 2)
    assert all("is not the folder that process 0 writes to" in line for line in outcome.lines)
    assert not (tmp_path / "0" / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2, but"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "no number"),
    ],
)
def test_the_launchers_variables_must_be_whole(
    nybble: Callable[..., Any], words: list[object], monkeypatch: pytest.MonkeyPatch, variables: Any, message: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = nybble(*words)
    assert outcome.code == 2
    assert re.search(f"{message}.*torchrun", outcome.err)


def test_nobody_else_comes(launch: Launch, words: list[object], tmp_path: Path) -> None:
    def hasten(_rank: int) -> None:
        from nybble import processes

        processes._SECONDS_TO_MEET = 1

    outcome = launch(1, [*words, "--output_dir", tmp_path / "run"], setup=hasten, WORLD_SIZE="2")
    assert outcome.codes == (3,)
    assert "process 0 does not meet the 1 others at 127.0.0.1" in outcome.lines[0]


def test_batches_are_dealt_out_evenly_and_no_row_twice() -> None:
    from nybble.training.resuming import EvenBatches

    for n_rows, size, count in ((10, 2, 2), (10, 1, 4), (9, 2, 4), (8, 4, 1), (3, 4, 2)):
        made = EvenBatches(torch.utils.data.SequentialSampler(range(n_rows)), size, count)
        batches = list(made)
        assert len(batches) == len(made)
        assert len(batches) % count == 0
        assert [i for batch in batches for i in batch if i >= 0] == list(range(n_rows))
        assert count == 1 or all(len(batch) == size for batch in batches)
