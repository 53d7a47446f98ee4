"""TRL's own trainers take our 4-bit model as it is: nybble.register() and a NybbleConfig are the whole change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nybble

pytest.importorskip("trl", reason="trl is not installed")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_sft_trainer_trains_and_saves_a_stock_adapter(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base = tiny_llama()
    nybble.register()
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nybble.NybbleConfig(bnb_4bit_compute_dtype="float32"), dtype=torch.float32
    )
    rows = Dataset.from_list([{"text": "What is two plus two? Two plus two is four."}] * 8)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=8, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[],
            logging_steps=1, disable_tqdm=True, per_device_train_batch_size=4, gradient_checkpointing=False,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))

    # The whole model is the one that was trained; the settings say how its base was packed, which no adapter says.
    packed_as = {"method": "qlora", "bnb_4bit_compute_dtype": "float32", "device": "cpu"}
    done = nybble.merge(tmp_path / "adapter", tmp_path / "merged", packed_as, into="dequantized", dtype="float32")
    assert done["verified"]
    ids = torch.arange(4, 36).view(2, 16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    again = AutoModelForCausalLM.from_pretrained(  # the trainer's own computes its adapters in bfloat16
        base, quantization_config=nybble.NybbleConfig(bnb_4bit_compute_dtype="float32"), dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(merged, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_dpo_trainer_prefers_what_the_pairs_prefer(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """The reference is the same packed base without its adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    base = tiny_llama()
    nybble.register()
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nybble.NybbleConfig(bnb_4bit_compute_dtype="float32"), dtype=torch.float32
    )
    pairs = Dataset.from_list([{"prompt": "What is two?", "chosen": " It is two.", "rejected": " It is four."}] * 8)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=8, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[],
            logging_steps=1, disable_tqdm=True, per_device_train_batch_size=4, gradient_checkpointing=False,
        ),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    packed = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: model and reference are the same at first
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert logged[-1]["rewards/margins"] > 0
    assert all(torch.equal(buffer, packed[name]) for name, buffer in trainer.model.named_buffers())
