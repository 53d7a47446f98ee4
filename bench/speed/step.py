"""The training step against the stacks people use: tokens a second and peak memory, same rows, settings and weights.

    python -m bench.speed.step --data ../shared/data [--repeats 3] [--steps 5] [--arms nybble,hand] [--suite main]

A Llama of 168M random weights (hidden 1024, 8 layers, vocabulary 32,000), batches of 4 rows of guanaco-llama2-1k with
the Llama-2 tokenizer, r=8 on q and v, alpha 8, dropout 0.1, max_length 1024; every token is learned, as peers do.
Each arm runs in a process of its own, the arms take turns, and ratios are of medians. Tokens are counted without
padding; time is from the end of the first step to the end of the last; memory is the highest resident memory above that
of a process that has imported torch and transformers. `--suite` grid varies lengths, ranks, targets and method; growth
varies tokens, layers and rank of our own step. Prints a Markdown table and one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, HEADS, INTERMEDIATE = 32000, 1024, 16, 2816
ARMS = ("nybble", "hand", "hand-checkpointed", "trl")


@dataclass(frozen=True)
class Case:
    """One set of settings."""

    arm: str = "nybble"
    method: str = "qlora"
    r: int = 8
    targets: str = "q_proj,v_proj"
    dropout: float = 0.1
    max_length: int = 1024
    batch: int = 4
    layers: int = 8
    steps: int = 5
    recompute: str = "auto"


def write_base(folder: Path, data: Path, layers: int) -> Path:
    """The random base with the tokenizer beside it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = folder / f"base-{layers}"
    if not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            max_position_embeddings=4096,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        AutoTokenizer.from_pretrained(data / "tokenizers" / "llama2").save_pretrained(path)
    return path


class Clock:
    """Seconds between the ends of the first and the last step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.monotonic())


def nybble_arm(case: Case, base: Path, rows: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """Our own trainer, as `nybble train` runs it."""
    from transformers import TrainerCallback

    from nybble.data import Groups, prepare_rows
    from nybble.hardware import detect_device
    from nybble.models import attach, find_model, load_model, load_tokenizer
    from nybble.planning import Batches, plan_training, profile_of
    from nybble.recipe import load_recipe
    from nybble.run.directory import RunDirectory
    from nybble.run.record import Silent
    from nybble.training import Setup, train_model, trainer

    recipe = load_recipe(
        None,
        {
            "model_name_or_path": str(base), "dataset_name": str(rows), "method": case.method, "r": case.r,
            "lora_alpha": case.r, "lora_dropout": case.dropout, "target_modules": case.targets, "loss_on": "all",
            "max_length": case.max_length, "per_device_train_batch_size": case.batch, "num_train_epochs": 1,
            "eval_fraction": 0, "output_dir": str(folder / "run"), "logging_steps": 1, "save_steps": 10_000,
            "gradient_checkpointing": case.recompute, "report_to": "none", "device": "cpu",
        },
    )  # fmt: skip
    device = detect_device("cpu")
    source = find_model(recipe.model)
    tokenizer = load_tokenizer(source, recipe.model)
    prepared = prepare_rows(recipe.data, recipe.evaluation, tokenizer, recipe.training.seed)
    model, loaded = load_model(source, case.method, recipe.model, recipe.quantization, device)
    if case.method != "full":
        model = attach(model, recipe.lora, "base")
    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    trainer._tensorboard = lambda *_: [Ticks()]
    run = RunDirectory(folder / "run")
    run.create(overwrite=True)
    import torch

    dtype = getattr(torch, loaded.compute_dtype)
    plan = plan_training(recipe, source.config, profile_of(device), Batches.of(prepared, None, recipe), None)
    setup = Setup(run, device, dtype, Silent(), lambda _: 0.0, 0, case.steps, plan.step_memory)
    result = train_model(model, tokenizer, Groups(prepared.train), recipe.training, setup)
    yield "tokens", sum(len(example.input_ids) for example in prepared.train)
    yield "loss", result.train_loss
    yield "ends", clock.ends


def peer_rows(case: Case, base: Path, rows: Path) -> tuple[Any, list[list[int]]]:
    """Tokenizer and token ids of the rows, cut as TRL does."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = load_dataset("json", data_files=str(rows), split="train")["text"]
    return tokenizer, [tokenizer(text)["input_ids"][: case.max_length] for text in texts]


def peer_model(case: Case, base: Path) -> tuple[Any, Any]:
    """Base and LoraConfig of transformers + PEFT + bitsandbytes."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    settings = {"quantization_config": four_bits} if case.method == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="cpu", **settings)
    targets: Any = case.targets if case.targets == "all-linear" else case.targets.split(",")
    return model, LoraConfig(
        task_type="CAUSAL_LM", r=case.r, lora_alpha=case.r, lora_dropout=case.dropout, target_modules=targets
    )


def hand_arm(case: Case, base: Path, rows: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """A loop by hand over transformers + PEFT + bitsandbytes in bfloat16."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training

    _tokenizer, ids = peer_rows(case, base, rows)
    model, config = peer_model(case, base)
    checkpointed = case.arm == "hand-checkpointed"
    if checkpointed:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    clock = Clock()
    for first in range(0, len(ids), case.batch):
        batch = [torch.tensor(row) for row in ids[first : first + case.batch]]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=0)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        labels = padded.masked_fill(mask == 0, -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=padded, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    yield "tokens", sum(map(len, ids))
    yield "loss", float(loss)
    yield "ends", clock.ends


def trl_arm(case: Case, base: Path, rows: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """TRL's SFTTrainer with its defaults."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer, ids = peer_rows(case, base, rows)
    model, config = peer_model(case, base)
    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=case.batch, max_length=case.max_length,
            num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(rows), split="train"),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[Ticks()],
    )  # fmt: skip
    done = trainer.train()
    yield "tokens", sum(map(len, ids))
    yield "loss", done.training_loss
    yield "ends", clock.ends


def run_arm(case: Case, base: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """One arm in this process: what it measured."""
    import psutil

    if case.arm == "nybble":  # as the command line does
        from nybble.cli.process import own_process

        own_process()
    import torch
    import transformers

    bare = psutil.Process().memory_info().rss
    arms: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
        "nybble": nybble_arm, "hand": hand_arm, "hand-checkpointed": hand_arm, "trl": trl_arm,
    }  # fmt: skip
    Path("/proc/self/clear_refs").write_text("5")
    found = dict(arms[case.arm](case, base, rows, folder))
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    ends = found.pop("ends")
    share = (len(ends) - 1) / len(ends)  # the first step is not timed; every step has as many rows
    seconds = ends[-1] - ends[0]
    return {
        **found,
        "seconds": seconds,
        "tokens_per_second": found["tokens"] * share / seconds,
        "peak_bytes": peak - bare,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def gemm_rate() -> float:
    """FLOP/s of bfloat16 products of the step's own shape, here and now."""
    import torch

    a, b = torch.randn(1715, HIDDEN).bfloat16(), torch.randn(INTERMEDIATE, HIDDEN).bfloat16()
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        a @ b.t()
        best = min(best, time.perf_counter() - started)
    return 2 * a.numel() * INTERMEDIATE / best


def measure(cases: list[Case], data: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Every case `repeats` times, taking turns; medians."""
    from datasets import load_dataset

    results: list[list[dict[str, Any]]] = [[] for _ in cases]
    rates: list[float] = []
    for turn in range(repeats):
        for number, case in enumerate(cases):
            base = write_base(folder, data, case.layers)
            rows = folder / f"rows-{case.steps}-{case.batch}.jsonl"
            if not rows.exists():
                table = load_dataset("parquet", data_files=str(data / "rows" / "guanaco-llama2-1k.parquet"))["train"]
                chosen = table.select(range(case.steps * case.batch))
                rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen["text"]))
            rates.append(gemm_rate())
            words = [__file__, "--child", json.dumps(asdict(case)), str(base), str(rows), str(folder)]
            done = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, check=False, env={**os.environ}
            )
            if done.returncode:
                raise SystemExit(f"{case.arm} failed: {done.stderr[-2000:]}")
            results[number].append(json.loads(done.stdout.splitlines()[-1]))
            print(turn, case.arm, json.dumps(results[number][-1]), file=sys.stderr, flush=True)
    rate = statistics.median(rates)
    keys = ("tokens_per_second", "peak_bytes", "seconds", "tokens", "loss")
    medians = [{k: statistics.median(r[k] for r in found) for k in keys} for found in results]
    rows_found = [{**asdict(case), **found} for case, found in zip(cases, medians, strict=True)]
    for row in rows_found:
        weights = row["layers"] * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE) + VOCABULARY * HIDDEN
        row["share_of_roofline"] = 4 * weights * row["tokens_per_second"] / rate
    return {"gemm_flops_per_second": rate, "cases": rows_found, "versions": results[0][0]["versions"]}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown, the first case being the one that others are compared with."""
    first = found["cases"][0]
    lines = [
        "| arm | method | r, targets | length | tokens/s | ours is | peak MB | ours takes | of roofline |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in found["cases"]:
        faster = first["tokens_per_second"] / c["tokens_per_second"]
        leaner = first["peak_bytes"] / c["peak_bytes"]
        lines.append(
            f"| {c['arm']} | {c['method']} | {c['r']}, {c['targets']} | {c['max_length']} "
            f"| {c['tokens_per_second']:.0f} | {faster:.2f}x | {c['peak_bytes'] / 1e6:.0f} | {leaner:.2f}x "
            f"| {100 * c['share_of_roofline']:.0f} % |"
        )
    return "\n".join(lines)


def suite(name: str, case: Case, arms: list[str]) -> list[Case]:
    """The cases of a suite."""
    if name == "main":
        return [replace(case, arm=arm) for arm in arms]
    if name == "grid":
        variants = [
            *(replace(case, max_length=length) for length in (512, 2048)),
            replace(case, r=16, targets="all-linear"),
            replace(case, method="lora"),
        ]
        return [replace(v, arm=arm) for v in variants for arm in ("nybble", "hand")]
    return [
        *(replace(case, batch=batch) for batch in (1, 2, 4, 8)),
        *(replace(case, layers=layers) for layers in (2, 4, 12)),
        *(replace(case, r=r, targets="all-linear") for r in (8, 64, 128)),
        *(replace(case, recompute=recompute) for recompute in ("always",)),
    ]


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        case, base, rows, folder = sys.argv[2:]
        found = run_arm(Case(**json.loads(case)), Path(base), Path(rows), Path(folder))
        print(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--suite", choices=("main", "grid", "growth"), default="main")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = suite(asked.suite, Case(steps=asked.steps), asked.arms.split(","))
        found = measure(cases, asked.data, asked.repeats, Path(folder))
    print(table(found))
    print(json.dumps({"benchmark": f"step-{asked.suite}", "repeats": asked.repeats, **found}))


if __name__ == "__main__":
    main()
