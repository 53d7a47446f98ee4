"""The arms of `bench.speed.step`: each trains the same rows from the same weights, in a process of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import ResidentPeak

ARMS = ("nybble", "hand", "hand-checkpointed", "trl")
OTHER = "nybble-other"  # ours, from another checkout: --other


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


class Clock:
    """When each step ended, and the peak of memory by then. An observer of `nybble.train` as well."""

    def __init__(self, peak: ResidentPeak) -> None:
        self._peak = peak
        self.ends: list[float] = []
        self.peak_bytes = 0
        self.tokens = 0  # as `nybble.train` counts them, without padding

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.monotonic())
        self.peak_bytes = self._peak.read()

    def step(self, event: Any) -> None:
        """A step was logged."""
        self.tokens = event.tokens
        self.tick()

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Ignore what else an observer is told, in this version or another."""
        return lambda *_, **__: None


def run_arm(case_fields: dict[str, Any], base: str, rows: str, folder: str) -> dict[str, Any]:
    """One arm in this process: what it measured."""
    case = Case(**case_fields)
    if case.arm.startswith("nybble"):  # as the command line does
        from nybble.cli.process import own_process

        own_process()
    import torch
    import transformers

    clock = Clock(ResidentPeak())
    arms = {"nybble": nybble_arm, OTHER: nybble_arm, "trl": trl_arm}
    tokens, loss = arms.get(case.arm, hand_arm)(case, Path(base), Path(rows), Path(folder), clock)
    share = (len(clock.ends) - 1) / len(clock.ends)  # the first step is not timed; every step has as many rows
    seconds = clock.ends[-1] - clock.ends[0]
    return {
        "tokens": tokens,
        "loss": loss,
        "seconds": seconds,
        "tokens_per_second": tokens * share / seconds,
        "peak_bytes": clock.peak_bytes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def nybble_arm(case: Case, base: Path, rows: Path, folder: Path, clock: Clock) -> tuple[int, float]:
    """`nybble.train`, which is the same call in every version."""
    import nybble

    out = folder / case.arm
    shutil.rmtree(out, ignore_errors=True)  # of the turn before
    settings = {
        "model_name_or_path": base, "dataset_name": rows, "method": case.method, "r": case.r,
        "lora_alpha": case.r, "lora_dropout": case.dropout, "target_modules": case.targets, "loss_on": "all",
        "max_length": case.max_length, "per_device_train_batch_size": case.batch, "num_train_epochs": 1,
        "eval_fraction": 0, "n_samples": 0, "output_dir": out, "logging_steps": 1, "save_steps": 10_000,
        "gradient_checkpointing": case.recompute, "report_to": "none", "device": "cpu",
    }  # fmt: skip
    words = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    record = nybble.train(nybble.load_recipe(None, words), observer=clock)
    return clock.tokens, record.train_loss


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


def hand_arm(case: Case, base: Path, rows: Path, _folder: Path, clock: Clock) -> tuple[int, float]:
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
    return sum(map(len, ids)), float(loss)


def trl_arm(case: Case, base: Path, rows: Path, folder: Path, clock: Clock) -> tuple[int, float]:
    """TRL's SFTTrainer with its defaults."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer, ids = peer_rows(case, base, rows)
    model, config = peer_model(case, base)

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
    ended = trainer.train()
    return sum(map(len, ids)), ended.training_loss
