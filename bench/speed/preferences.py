"""Preference tuning against TRL's DPOTrainer, and against our own supervised step over the same tokens.

    python -m bench.speed.preferences --data FOLDER

The Llama of 168M random weights, r=8 on q and v, batches of 4 pairs cut from guanaco-llama2-1k: prompts of 200 to 400
tokens, answers of 100 to 300. `dpo` is ours; `sft` is ours over rows with a pair's prompt and both of its answers
behind one another, so the same tokens, as many of them learned; `trl` is DPOTrainer with PEFT and bitsandbytes, and its
defaults. Each arm runs in a process of its own, the arms take turns, and ratios are of medians. Time is from the end
of the first step to the end of the last; our reference, which is computed before, is a figure of its own and counted in
`pairs_per_second_with_reference`. On a machine that others use, `processor_seconds_a_pair` (the steps, and the
reference) is the figure that holds. Memory is the highest resident memory above that of a process that has imported
torch and transformers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from bench.harness import Figures, Option, ResidentPeak, fresh, medians, print_table, processor_seconds, run
from bench.models import write_llama
from bench.speed.step_arms import Case, Clock, peer_model

ARMS = ("dpo", "sft", "trl")
MAX_LENGTH = 1024
BUSY = "processor_seconds_a_pair_with_reference"


def write_pairs(folder: Path, data: Path, n_pairs: int) -> tuple[Path, Path]:
    """Pairs of real text, and the same as supervised rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "llama2")
    table = load_dataset("parquet", data_files=str(data / "rows" / "guanaco-llama2-1k.parquet"))["train"]
    ids = iter(tokenizer(" ".join(table["text"]), add_special_tokens=False)["input_ids"])
    random = Random(0)

    def text(low: int, high: int) -> str:
        return str(tokenizer.decode([next(ids) for _ in range(random.randint(low, high))]))

    pairs = [{"prompt": text(200, 400), "chosen": text(100, 300), "rejected": text(100, 300)} for _ in range(n_pairs)]
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"] + pair["rejected"]} for pair in pairs]
    files = (folder / "pairs.jsonl", folder / "rows.jsonl")
    for file, content in zip(files, (pairs, rows), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return files


class Ticking(Clock):
    """Also how much processor time was spent by each end of a step, and on the reference."""

    def __init__(self, peak: ResidentPeak) -> None:
        super().__init__(peak)
        self.busy: list[float] = []
        self.reference_busy = 0.0
        self._began = 0.0

    def tick(self) -> None:
        """A step has ended."""
        super().tick()
        self.busy.append(processor_seconds())

    def stage(self, name: str) -> None:
        """A stage of the run begins."""
        if name == "precompute":
            self._began = processor_seconds()
        elif name == "train" and self._began:
            self.reference_busy = processor_seconds() - self._began


def run_arm(arm: str, base: str, rows: str, folder: str, batch: int) -> dict[str, Any]:
    """One arm in this process: what it measured."""
    if arm != "trl":  # as the command line does
        from nybble.cli.process import own_process

        own_process()
    import torch  # noqa: F401 - before the memory is noted
    import transformers  # noqa: F401

    clock = Ticking(ResidentPeak())
    n_rows = len(Path(rows).read_text().splitlines())
    train = trl_arm if arm == "trl" else nybble_arm
    loss, reference_seconds = train(arm, Path(base), Path(rows), Path(folder), batch, clock)
    busy = clock.busy[-1] - clock.busy[0]
    timed = n_rows * (len(clock.ends) - 1) / len(clock.ends)  # the first step is not timed
    seconds = clock.ends[-1] - clock.ends[0]
    return {
        "pairs_per_second": timed / seconds,
        "pairs_per_second_with_reference": timed / (seconds + reference_seconds * timed / n_rows),
        "processor_seconds_a_pair": busy / timed,
        "processor_seconds_a_pair_with_reference": busy / timed + clock.reference_busy / n_rows,
        "step_seconds": seconds / (len(clock.ends) - 1),
        "reference_seconds": reference_seconds,
        "peak_bytes": clock.peak_bytes,
        "tokens": clock.tokens,
        "loss": loss,
    }


def nybble_arm(arm: str, base: Path, rows: Path, folder: Path, batch: int, clock: Ticking) -> tuple[float, float]:
    """Our training: mean loss, and the seconds of the reference."""
    import nybble

    out = folder / arm
    shutil.rmtree(out, ignore_errors=True)  # of the turn before
    settings = {
        "model_name_or_path": str(base), "dataset_name": str(rows), "objective": arm, "r": 8, "lora_alpha": 8,
        "lora_dropout": 0.1, "target_modules": "q_proj,v_proj", "max_length": MAX_LENGTH, "num_train_epochs": 1,
        "per_device_train_batch_size": batch, "eval_fraction": 0, "n_samples": 0, "output_dir": str(out),
        "logging_steps": 1, "save_steps": 10_000, "report_to": "none", "device": "cpu", "cache": False,
    }  # fmt: skip
    record = nybble.train(nybble.load_recipe(None, settings), observer=clock)
    reference = record.phases.get("reference")
    return record.train_loss or 0.0, reference.seconds if reference else 0.0


def trl_arm(_arm: str, base: Path, rows: Path, folder: Path, batch: int, clock: Ticking) -> tuple[float, float]:
    """TRL's DPOTrainer with its defaults; it asks the reference in each step."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model, config = peer_model(Case(), base)

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=batch, max_length=MAX_LENGTH, use_cpu=True,
            num_train_epochs=1, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(rows), split="train"),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[Ticks()],
    )  # fmt: skip
    return float(trainer.train().training_loss), 0.0


def measure(asked: Namespace) -> dict[str, Any]:
    """Every arm, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_llama(folder / "base", asked.hidden, asked.layers, asked.data / "tokenizers" / "llama2")
        pairs, rows = write_pairs(folder, asked.data, asked.steps * asked.batch)

        def side(arm: str) -> Callable[[], Figures]:
            words = (arm, str(base), str(rows if arm == "sft" else pairs), str(folder), asked.batch)
            return lambda: dict(fresh("bench.speed.preferences", "run_arm", *words))

        found = medians({arm: side(arm) for arm in asked.arms}, asked.repeats, warm_up=False)
    first = found[asked.arms[0]]
    print_table(
        "arm | pairs/s | processor s a pair | with the reference | ours is | peak MB | ours takes",
        (
            (
                arm, f"{figures['pairs_per_second']:.3f}", f"{figures['processor_seconds_a_pair']:.2f}",
                f"{figures[BUSY]:.2f}", f"{figures[BUSY] / first[BUSY]:.2f}x",
                f"{figures['peak_bytes'] / 1e6:.0f}", f"{first['peak_bytes'] / figures['peak_bytes']:.2f}x",
            )
            for arm, figures in found.items()
        ),
    )  # fmt: skip
    return {"arms": found}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("repeats", 3, tiny=1),
        Option("steps", 5, tiny=2),
        Option("arms", ARMS, help=f"of {', '.join(ARMS)}"),
        Option("hidden", 1024, tiny=128),
        Option("layers", 8, tiny=1),
        Option("batch", 4, tiny=1),
        data=True,
    )
