"""The ledger of a million rows and batches of them, and preparing rows beside TRL.

    python -m bench.speed.rows large --data FOLDER      FOLDER holds tokenizers/llama2
    python -m bench.speed.rows trl --data FOLDER        and rows/guanaco-llama2-1k.parquet

`large` writes generated [INST] rows to a .jsonl file, then runs three processes, one after the other: the ledger
(`nybble data`), the ledger again from the cache, and one epoch of shuffled batches of 8 rows. `trl` alternates between
`SFTTrainer`'s preparation and ours, on the 1,000 rows and on four copies of each, with one and with two processes, and
no cache on either side; processor seconds say more than the clock's where other programs run.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Figures, Option, medians, print_table, processor_seconds, run, watch

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


def large(data: Path, folder: Path, n_rows: int) -> dict[str, Any]:
    """Ledger, ledger from the cache, batches."""
    rows, tokenizer = folder / "rows.jsonl", str(data / "tokenizers" / "llama2")
    write_rows(rows, n_rows)
    environment = {**os.environ, "NYBBLE_CACHE": str(folder / "cache")}
    words = ["data", "--model", tokenizer, "--dataset_name", str(rows), "--show", "0", "--json"]
    found: dict[str, Any] = {"rows": n_rows, "rows_file_bytes": rows.stat().st_size}
    for name in ("ledger", "ledger_from_cache"):
        output, found[name] = watch([sys.executable, "-m", "nybble", *words], environment)
        ledger = json.loads(output)["ledger"]
    found["ledger"]["tokens"] = round(ledger["length_mean"] * ledger["rows_read"])
    found["kept_bytes"] = sum(file.stat().st_size for file in (folder / "cache").rglob("*.arrow"))
    output, found["batches"] = watch([sys.executable, "-c", BATCHES, tokenizer, str(rows)], environment)
    found["batches"] |= dict(zip(("tokens", "epoch_seconds"), map(float, output.split()), strict=True))
    for name, value in found.items():
        print(f"{name:<28} {value}")
    return found


def counted(prepare: Callable[[], int]) -> Callable[[], Figures]:
    """`prepare`, which returns its tokens, with its seconds by the clock and of the processor."""

    def measured() -> Figures:
        began, computed = time.monotonic(), processor_seconds()
        tokens = prepare()
        return {
            "tokens": tokens,
            "seconds": time.monotonic() - began,
            "processor_seconds": processor_seconds() - computed,
        }

    return measured


def beside_trl(data: Path, folder: Path, asked: Namespace) -> dict[str, Any]:
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
    ).select(range(asked.guanaco_rows))
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(tiny)

    def compared(copies: int, processes: int) -> dict[str, Any]:
        file = folder / f"{copies}.parquet"
        datasets.concatenate_datasets([whole] * copies).to_parquet(str(file))
        # TRL prepares rows when a trainer is made; a few rows keep that apart from what is measured.
        settings = SFTConfig(
            str(folder),
            max_length=MAX_LENGTH,
            dataset_num_proc=processes if processes > 1 else None,  # 1 would start a process as well
            report_to=[],
            use_cpu=True,
        )
        trainer = SFTTrainer(model, settings, train_dataset=whole.select(range(2)), processing_class=tokenizer)

        def theirs() -> int:
            rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(folder))
            ready = trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "train")
            return int(compute.sum(compute.list_value_length(ready.data.column("input_ids"))).as_py())

        def ours() -> int:
            section = DataSection(
                dataset_name=str(file), max_length=MAX_LENGTH, eval_fraction=0, dataset_num_proc=processes
            )
            return prepare_rows(section, EvaluationSection(), tokenizer, 0).ledger.tokens_total

        sides = medians({"trl": counted(theirs), "nybble": counted(ours)}, asked.repeats)
        ratios = {
            f"ratio_of_{key}": sides["trl"][key] / sides["nybble"][key] for key in ("seconds", "processor_seconds")
        }
        return {"rows": len(whole) * copies, "processes": processes, **sides, **ratios}

    cases = ((1, 1),) if asked.tiny else ((1, 1), (4, 1), (4, 2))
    found = [compared(copies, processes) for copies, processes in cases]
    print_table(
        "rows | processes | TRL's seconds over ours | processor seconds",
        (
            (
                case["rows"],
                case["processes"],
                f"{case['ratio_of_seconds']:.2f}",
                f"{case['ratio_of_processor_seconds']:.2f}",
            )
            for case in found
        ),
    )
    return {"cases": found}


def measure(asked: Namespace) -> dict[str, Any]:
    """One of the two parts."""
    with tempfile.TemporaryDirectory() as folder:
        if asked.part == "large":
            return large(asked.data, Path(folder), asked.rows)
        return beside_trl(asked.data, Path(folder), asked)


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("rows", 1_000_000, tiny=200, help="large: rows that are generated"),
        Option("guanaco_rows", 1000, tiny=20, help="trl: rows that are taken"),
        Option("repeats", 7, tiny=1),
        parts=("large", "trl"),
        data=True,
    )
