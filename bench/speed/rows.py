"""Preparing rows: a million of them in bounded memory, and the speed beside TRL's preparation of the same rows.

    python -m bench.speed.rows --data FOLDER large [--rows 1000000]
    python -m bench.speed.rows --data FOLDER trl [--rounds 7]

FOLDER holds tokenizers/llama2 and rows/guanaco-llama2-1k.parquet. `large` writes generated [INST] rows to a .jsonl
file, then runs three processes, one after the other: the ledger (`nybble data`), the ledger again from the cache, and
one epoch of shuffled batches of 8 rows. Memory is sampled: anonymous pages (those of mapped files are the
system's) of the process and its workers, pages that they share counted once. `trl` alternates between `SFTTrainer`'s
preparation and ours, on the 1,000 rows and on four copies of each, with one and with two processes; no cache on either
side; processor seconds tell more than the clock's where other work runs. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from nybble.hardware import detect_device
from nybble.training import software_versions

MAX_LENGTH = 1024
BATCHES = """
import sys, time, torch
from transformers import AutoTokenizer
from nybble.storage.cache import Cache
from nybble.data import FlatBatch, Groups, prepare_rows
from nybble.recipe import DataSection, EvaluationSection
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
cache = Cache("rows", 64 << 30)
train = prepare_rows(DataSection(dataset_name=sys.argv[2]), EvaluationSection(), tokenizer, 42, cache).train
started = time.monotonic()
loader = torch.utils.data.DataLoader(Groups(train), 8, shuffle=True, collate_fn=FlatBatch())
tokens = sum(batch["input_ids"].shape[1] for batch in loader)
print(tokens, time.monotonic() - started)
"""


def write_rows(file: Path, n_rows: int) -> None:
    """Questions and answers of generated words, about 100 tokens a row, no two alike."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeiounrstl", k=draw.randint(1, 7))) for _ in range(2000)]
    with file.open("w") as stream:
        for number in range(n_rows):
            question, answer = (" ".join(draw.choices(words, k=draw.randint(2, most))) for most in (12, 70))
            stream.write(json.dumps({"text": f"<s>[INST] {question} {number}? [/INST] {answer}. </s>"}) + "\n")


def run_watched(command: list[str], environment: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Output, seconds, processor seconds, and the peak of anonymous memory, each of the process and its children."""
    started, computed, peak = time.monotonic(), cpu_seconds(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as it:
        process = psutil.Process(it.pid)
        while it.poll() is None:
            peak = max(peak, sum(map(anonymous_bytes, [process, *process.children(recursive=True)])))
            time.sleep(0.2)
        assert it.stdout is not None
        output = it.stdout.read()
        assert it.returncode == 0, command
    seconds = {"seconds": time.monotonic() - started, "cpu_seconds": cpu_seconds() - computed}
    return output, seconds | {"peak_bytes": peak}


def cpu_seconds() -> float:
    """Processor time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def anonymous_bytes(process: psutil.Process) -> int:
    """Memory of a process without pages of mapped files, and its part of what it shares; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon")), 0)


def large(data: Path, folder: Path, n_rows: int) -> dict[str, Any]:
    """Ledger, ledger from the cache, batches."""
    rows, tokenizer = folder / "rows.jsonl", str(data / "tokenizers" / "llama2")
    write_rows(rows, n_rows)
    environment = {**os.environ, "NYBBLE_CACHE": str(folder / "cache")}
    words = ["data", "--model", tokenizer, "--dataset_name", str(rows), "--show", "0", "--json"]
    found: dict[str, Any] = {"rows": n_rows, "rows_file_bytes": rows.stat().st_size}
    for name in ("ledger", "ledger_from_cache"):
        output, found[name] = run_watched([sys.executable, "-m", "nybble", *words], environment)
        ledger = json.loads(output)["ledger"]
    found["ledger"]["tokens"] = round(ledger["length_mean"] * ledger["rows_read"])
    found["kept_bytes"] = sum(file.stat().st_size for file in (folder / "cache").rglob("*.arrow"))
    output, found["batches"] = run_watched([sys.executable, "-c", BATCHES, tokenizer, str(rows)], environment)
    found["batches"] |= dict(zip(("tokens", "epoch_seconds"), map(float, output.split()), strict=True))
    return found


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, Any]:
    """Tokens and seconds of each side, by the clock and of the processor; the first round fills caches, uncounted."""
    clock: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    tokens = {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started, computed = time.monotonic(), cpu_seconds()
            tokens[name] = side()
            if number:
                clock[name].append(time.monotonic() - started)
                cpu[name].append(cpu_seconds() - computed)
    medians = {
        kind: {name: statistics.median(all_of[name]) for name in sides}
        for kind, all_of in (("seconds", clock), ("cpu_seconds", cpu))
    }
    return {
        "tokens": tokens,
        "seconds": clock,
        "cpu_seconds": cpu,
        "median": medians,
        "ratio_of_medians": {kind: each["trl"] / each["nybble"] for kind, each in medians.items()},
        "tokens_per_cpu_second": {name: tokens[name] / medians["cpu_seconds"][name] for name in sides},
    }


def beside_trl(data: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Both preparations of the same parquet files, by rows and processes."""
    import datasets
    from pyarrow import compute
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from nybble.data import prepare_rows
    from nybble.recipe import DataSection, EvaluationSection

    warnings.simplefilter("ignore")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "llama2", pad_token="<unk>")  # noqa: S106
    whole = datasets.load_dataset(
        "parquet", data_files=str(data / "rows" / "guanaco-llama2-1k.parquet"), split="train", cache_dir=str(folder)
    )
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    found = {}
    for copies, processes in ((1, 1), (4, 1), (4, 2)):
        file = folder / f"{copies}.parquet"
        datasets.concatenate_datasets([whole] * copies).to_parquet(str(file))
        # TRL prepares when it is made; a few rows keep that apart from what is measured.
        settings = SFTConfig(
            str(folder),
            max_length=MAX_LENGTH,
            dataset_num_proc=processes if processes > 1 else None,  # 1 would be a process beside this one
            report_to=[],
            use_cpu=True,
        )
        trainer = SFTTrainer(model, settings, train_dataset=whole.select(range(2)), processing_class=tokenizer)

        def theirs(file: Path = file, trainer: Any = trainer) -> int:
            rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(folder))
            done = trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "train")
            return int(compute.sum(compute.list_value_length(done.data.column("input_ids"))).as_py())

        def ours(file: Path = file, processes: int = processes) -> int:
            section = DataSection(
                dataset_name=str(file), max_length=MAX_LENGTH, eval_fraction=0, dataset_num_proc=processes
            )
            return prepare_rows(section, EvaluationSection(), tokenizer, 0).ledger.tokens_total

        rows, plural = 1000 * copies, "" if processes == 1 else "es"
        found[f"{rows:,} rows, {processes} process{plural}"] = alternate({"trl": theirs, "nybble": ours}, rounds)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("large", "trl"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "large":
            result = large(arguments.data, Path(folder), arguments.rows)
        else:
            result = beside_trl(arguments.data, Path(folder), arguments.rounds)
    for name, value in result.items():
        print(f"{name:<28} {value}")
    print(json.dumps({"results": result, "device": detect_device("cpu").name, "versions": software_versions()}))


if __name__ == "__main__":
    main()
