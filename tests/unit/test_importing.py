"""Recipes of TRL, Axolotl and LLaMA-Factory in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nybble.cli.main import run as run_nybble
from nybble.errors import RecipeError
from nybble.recipe import DataSet, load_recipe
from nybble.recipe.catalogue import spellings
from nybble.recipe.importing import DEFAULTS, Imported, import_recipe

TRL = """
# Supervised fine-tuning of a small chat model
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
model_revision: main
dtype: bfloat16
attn_implementation: flash_attention_2
load_in_4bit: true
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
lora_modules_to_save: [lm_head]
dataset_name: trl-lib/Capybara
dataset_num_proc: 8
max_length: 4096
packing: true
eos_token: <|im_end|>
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
optim: paged_adamw_8bit
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_ratio: 0.1
eval_strategy: steps
eval_steps: 100
save_strategy: epoch
load_best_model_at_end: false
neftune_noise_alpha: 5
assistant_only_loss: true
dataloader_num_workers: 4
bf16: true
tf32: true
report_to: [wandb]
run_name: qwen-sft
push_to_hub: false
hub_token: null
seed: 7
output_dir: data/qwen-sft
"""
AXOLOTL = """
base_model: mistralai/Mistral-7B-v0.1
model_type: MistralForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: rows/support.jsonl
    ds_type: json
    type: chat_template
    field_messages: conversations
  - path: rows/other.jsonl
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 8192
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project: support
wandb_name: first
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 2e-4
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience: 3
flash_attention: true
loraplus_lr_ratio: 16
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
eval_max_new_tokens: 128
weight_decay: 0.0
tokens: ["<|tool|>"]
special_tokens: {pad_token: "</s>"}
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
pissa_init: true
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
mask_history: true
flash_attn: fa2
"""


def imported(tmp_path: Path, text: str | dict[str, Any]) -> Imported:
    file = tmp_path / "theirs.yaml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return import_recipe(file)


EXPECTED = {
    TRL: {
        "lora.modules_to_save": ("lm_head",),
        "method": "qlora",
        "model.model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "lora.r": 32,
        "lora.lora_dropout": 0.05,  # TRL's default
        "lora.target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "data.packing": True,
        "data.loss_on": "answers",
        "data.eval_fraction": 0.0,
        "training.gradient_checkpointing": "always",
        "training.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "training.save_strategy": "epoch",
        "training.report_to": "wandb",
        "training.neftune_noise_alpha": 5,
        "evaluation.eval_steps": 100,
        "quantization.bnb_4bit_compute_dtype": "bfloat16",
    },
    AXOLOTL: {
        "lora.new_tokens": ("<|tool|>",),
        "method": "qlora",
        "data.dataset_name": (DataSet(path="rows/support.jsonl"), DataSet(path="rows/other.jsonl")),
        "data.max_length": 8192,
        "data.loss_on": "answers",
        "data.eval_fraction": 0.1,
        "lora.target_modules": "all-linear",
        "training.learning_rate": 2e-4,
        "training.num_train_epochs": 2,
        "training.lr_scheduler_type": "cosine_with_min_lr",
        "training.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "training.warmup_steps": 10,
        "training.save_strategy": "epoch",
        "training.loraplus_lr_ratio": 16,
        "training.run_name": "first",
        "evaluation.eval_steps": 0.125,  # 4 an epoch in 2 epochs
        "evaluation.early_stopping_patience": 3,
        "evaluation.max_new_tokens": 128,
    },
    LLAMA_FACTORY: {
        "method": "qlora",
        "lora.r": 8,  # its default
        "lora.lora_alpha": 16,  # twice the rank
        "lora.init_lora_weights": "pissa",
        "lora.target_modules": "all-linear",
        "data.dataset_name": (DataSet(path="identity"), DataSet(path="alpaca_en_demo")),
        "data.loss_on": "last_answer",
        "data.eval_fraction": 0.1,
        "training.warmup_ratio": 0.1,
    },
}
REMARKED = {
    TRL: "eos_token gradient_checkpointing_kwargs dataloader_num_workers tf32",
    AXOLOTL: "model_type tokenizer_type datasets dataset_prepared_path pad_to_sequence_len "
    "wandb_project flash_attention special_tokens",
    LLAMA_FACTORY: "quantization_method dataset max_samples template overwrite_cache plot_loss ddp_timeout flash_attn",
}
TOOL = {TRL: "TRL", AXOLOTL: "Axolotl", LLAMA_FACTORY: "LLaMA-Factory"}


@pytest.mark.parametrize("text", [TRL, AXOLOTL, LLAMA_FACTORY], ids=TOOL.values())
def test_a_whole_recipe_is_ours(tmp_path: Path, text: str) -> None:
    found = imported(tmp_path, text)
    assert found.tool == TOOL[text]
    assert sorted({remark.partition(" (")[0].partition(":")[0] for remark in found.remarks}) == sorted(
        REMARKED[text].split()
    )
    for path, value in EXPECTED[text].items():
        section, _, name = path.rpartition(".")
        assert getattr(getattr(found.recipe, section) if section else found.recipe, name) == value, path
    file = tmp_path / "ours.yaml"
    file.write_text(found.to_yaml("theirs.yaml"))
    assert load_recipe(file) == found.recipe
    head = file.read_text().partition("\nmethod:")[0] + "\n"
    assert all(f"#   {remark}\n" in head for remark in found.remarks)


@pytest.mark.parametrize("text", [TRL, AXOLOTL, LLAMA_FACTORY], ids=TOOL.values())
def test_no_name_is_dropped_unsaid(tmp_path: Path, text: str) -> None:
    """Without any one of its names that is no remark, what is written is another recipe, or the value is a default."""
    whole = imported(tmp_path, text)
    content = yaml.safe_load(text)
    silent = {"dtype", "bf16", "use_peft", "do_train", "overwrite_output_dir", "stage"}  # said twice, or by the verb
    for name, value in content.items():
        if value is None or value is False or name in silent or any(r.startswith(name) for r in whole.remarks):
            continue
        if name in spellings() and f"{spellings()[name]}" in whole.settings:
            continue
        rest = imported(tmp_path, {key: said for key, said in content.items() if key != name})
        assert rest.settings != whole.settings, name


def test_what_the_tools_do_by_default_is_written_out(tmp_path: Path) -> None:
    from trl import ModelConfig, SFTConfig

    arguments, model = SFTConfig, ModelConfig
    for path, value in DEFAULTS["trl"].items():
        name = path.rpartition(".")[2]
        theirs = {"warmup_ratio": arguments.warmup_steps, "eval_fraction": 0.0}
        assert theirs.get(name, getattr(arguments, name, getattr(model, name, None))) == value, path
    ours = load_recipe()
    assert (arguments.num_train_epochs, arguments.lr_scheduler_type) == (3.0, ours.training.lr_scheduler_type)
    assert (arguments.max_length, model.lora_r, model.lora_alpha) == (
        ours.data.max_length,
        ours.lora.r,
        ours.lora.lora_alpha,
    )
    found = imported(tmp_path, {"model_name_or_path": "a", "dataset_name": "b", "learning_rate": 1e-3})
    assert found.recipe.method == "full"
    assert found.recipe.training.per_device_train_batch_size == 8
    assert "lora.lora_dropout" not in found.settings


@pytest.mark.parametrize(
    ("content", "path", "value"),
    [
        ({"use_peft": True, "model_name_or_path": "a"}, "method", "lora"),
        ({"model_name_or_path": "a", "dtype": "float16"}, "quantization.bnb_4bit_compute_dtype", "float16"),
        ({"base_model": "a", "micro_batch_size": 2, "adapter": "lora"}, "method", "lora"),
        ({"base_model": "a", "micro_batch_size": 2}, "method", "full"),
        ({"base_model": "a", "adapter": "lora", "train_on_inputs": True}, "data.loss_on", "all"),
        ({"base_model": "a", "datasets": [{"path": "d", "name": "en", "split": "all"}]}, "data.dataset_config", "en"),
        ({"base_model": "a", "evals_per_epoch": 1}, "evaluation.eval_strategy", "epoch"),
        ({"base_model": "a", "evals_per_epoch": 0}, "evaluation.eval_strategy", "no"),
        ({"base_model": "a", "val_set_size": 200}, "evaluation.max_eval_rows", 200),
        ({"base_model": "a", "test_datasets": [{"path": "t"}]}, "data.eval_dataset_name", "t"),
        ({"stage": "pt", "finetuning_type": "full", "model_name_or_path": "a"}, "data.loss_on", "all"),
        ({"finetuning_type": "lora", "dataset": "rows.json", "lora_rank": 4}, "lora.lora_alpha", 8),
        ({"finetuning_type": "lora", "dataset": "a.json", "max_samples": 9}, "data.max_train_rows", 9),
        ({"finetuning_type": "lora", "pissa_init": True, "lora_rank": 2}, "lora.r", 2),  # the start is left out
        ({"finetuning_type": "lora", "deepspeed": "ds_z3.json"}, "training.distributed", "fsdp"),
        ({"finetuning_type": "lora", "adapter_name_or_path": "x"}, "lora.adapter_name_or_path", "x"),
    ],
)
def test_what_is_said_in_another_way(tmp_path: Path, content: dict[str, Any], path: str, value: Any) -> None:
    assert imported(tmp_path, content).settings[path] == value


def test_values_that_are_not_allowed_here_are_left_out_and_said(tmp_path: Path) -> None:
    found = imported(tmp_path, {"model_name_or_path": "a", "save_total_limit": 0, "lora_r": "many", "use_peft": True})
    assert "training.save_total_limit" not in found.settings
    told = [remark for remark in found.remarks if "is not allowed here" in remark]
    assert {remark.partition(":")[0] for remark in told} == {"training.save_total_limit", "lora.r"}


@pytest.mark.parametrize(
    "content",
    [
        {"base_model": "a", "datasets": 5, "evals_per_epoch": "often", "cosine_min_lr_ratio": "low"},
        {"base_model": "a", "datasets": [[]], "lora_r": [1], "adapter": "lora"},
        {"finetuning_type": ["lora"], "dataset": [], "lora_rank": "x", "val_size": {"a": 1}},
        {"stage": {}, "dataset": 7, "template": [1], "deepspeed": {"zero": 3}, "model_name_or_path": "a"},
    ],
)
def test_odd_values_are_left_out_and_said(tmp_path: Path, content: dict[str, Any]) -> None:
    found = imported(tmp_path, content)
    assert found.remarks
    assert load_recipe(None, found.settings) == found.recipe


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(AXOLOTL)
    assert run_nybble(["import", str(theirs)]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["method"] == "qlora"
    assert "flash_attention (True): " in printed.err
    assert run_nybble(["import", str(theirs), "--output", str(ours)]) == 0
    assert (capsys.readouterr().out, ours.read_text()) == ("", printed.out)
    assert run_nybble(["import", str(theirs), "--output", str(ours)]) == 2
    assert "already exists; choose a new file" in capsys.readouterr().err
    assert run_nybble(["import", str(theirs), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["tool"] == "Axolotl"
    assert content["settings"]["lora.r"] == 32
    assert content["remarks"]


@pytest.mark.parametrize("text", ["- a\n- b\n", "x: [1\n", "qqq: 1\n", ""])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):
        imported(tmp_path, text)
