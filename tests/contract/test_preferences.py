"""Preference objectives against TRL's own trainers, step by step, and against the same rows laid out otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

from nybble.data import IGNORED, Example, FlatBatch, Groups, PadBatch
from nybble.hardware import detect_device
from nybble.models import attach, swap_blocks
from nybble.recipe import LoraSection, PreferencesSection, TrainingSection
from nybble.run.directory import RunDirectory, read_lines
from nybble.run.record import Silent
from nybble.training import train_model
from nybble.training.preferences import PairObjective, RatedObjective
from nybble.training.reference import AnswerScorer, Reference, Start

STEPS = 50
ROWS_A_STEP = 4
SUBJECTS = ("The cat", "A small dog", "Her friend Tom", "The big red bird", "Lily", "An old man")
ENDS = (" sat on the mat and slept.", " ran.", " was very happy that day, and so were all of his friends.", " cried.")

pytestmark = pytest.mark.filterwarnings("ignore")


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], row: int) -> Example:
    ids = [*prompt, *chosen, *rejected]
    labels = [*[IGNORED] * len(prompt), *chosen, *rejected]
    segments = ((len(prompt), -1), (len(chosen), 0), (len(rejected), 0))
    start = len(prompt) + len(chosen)
    return Example(ids, labels, 2, 2, 0, (2,), 0, start, False, row, None, segments)


def rated(prompt: Sequence[int], answer: Sequence[int], row: int) -> Example:
    labels = [*[IGNORED] * len(prompt), *answer]
    return Example([*prompt, *answer], labels, 1, 1, 0, (2,), 0, len(prompt), False, row)


def texts(n: int = 12) -> list[dict[str, str]]:
    random = Random(0)
    return [
        {
            "prompt": f"Once upon a time there was a tree. {random.choice(SUBJECTS)}",
            "chosen": random.choice(ENDS),
            "rejected": random.choice(ENDS) + random.choice(ENDS),
        }
        for _ in range(n)
    ]


def objective_of(
    section: PreferencesSection, model: Any, tokenizer: Any, examples: Sequence[Example], labels: Sequence[bool] = ()
) -> Any:
    scorer = AnswerScorer(model, tokenizer, torch.float32, section.ld_alpha)
    reference = Reference(examples, 1 if labels else 2, scorer, Start(model))
    if section.needs_reference and section.precompute_ref_log_probs:
        reference.compute(model, None, lambda _done, _all: None)
    if labels:
        return RatedObjective(section, reference, torch.tensor(labels))
    return PairObjective(section, reference if section.needs_reference else None)


def trained(
    model: Any, tokenizer: Any, examples: Sequence[Example], objective: Any, folder: Path, **settings: Any
) -> list[dict[str, Any]]:
    """The logged steps of our loop."""
    values = {
        "per_device_train_batch_size": ROWS_A_STEP, "gradient_accumulation_steps": 1, "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "logging_steps": 1, "optim": "adamw_torch",
        "output_dir": str(folder), "max_grad_norm": 1.0, "weight_decay": 0.0, "adam_beta2": 0.999,
    }  # fmt: skip
    steps, memory = settings.pop("steps", STEPS), settings.pop("step_memory", None)
    run = RunDirectory(folder)
    run.create()
    train_model(
        model, tokenizer, Groups(examples), TrainingSection(**values | settings), run=run,
        device=detect_device("cpu"), compute_dtype=torch.float32, max_steps=steps, observer=Silent(),
        objective=objective, step_memory=memory,
    )  # fmt: skip
    return read_lines(folder / "events.jsonl")


def ours_of(base: Path, theirs: Any) -> Any:
    """Our blocks on the same base, with adapters that start as those of TRL's model."""
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    swap_blocks(bare, "float32")
    model = attach(bare, LoraSection(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"), "a/base")
    starts = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == starts.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(starts[name])
    return model


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": STEPS, "learning_rate": 1e-4, "lr_scheduler_type": "constant",
        "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": ROWS_A_STEP, "gradient_checkpointing": False, "optim": "adamw_torch",
        "max_length": 256,
    }  # fmt: skip


def in_order(trainer_class: Any) -> Any:
    class InOrder(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return InOrder


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"objective": "dpo"}, {"loss_type": ["sigmoid"]}),
    ({"objective": "dpo", "loss_type": "hinge"}, {"loss_type": ["hinge"]}),
    (
        {"objective": "dpo", "loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    ({"objective": "dpo", "rpo_alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    (
        {"objective": "dpo", "ld_alpha": 0.3, "precompute_ref_log_probs": False},
        {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    ),
    ({"objective": "ipo", "beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
    ({"objective": "kto", "undesirable_weight": 0.8}, {"undesirable_weight": 0.8}),
    ({"objective": "orpo", "beta": 0.3}, {"beta": 0.3}),
    (
        {"objective": "simpo", "beta": 2.0, "simpo_gamma": 0.4, "label_smoothing": 0.1},
        {"beta": 2.0, "simpo_gamma": 0.4, "label_smoothing": 0.1, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
]  # fmt: skip


def trl_trainer(kind: str, base: Path, folder: Path, settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "kto":
            from trl import KTOConfig as Config
            from trl import KTOTrainer as Trainer
        elif kind == "orpo":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer
        elif kind == "simpo":
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer
        else:
            from trl import DPOConfig as Config
            from trl import DPOTrainer as Trainer
    rows: list[dict[str, Any]] = list(texts())
    if kind == "kto":
        settings = {**settings, "train_sampling_strategy": "sequential"}
        rows = [
            {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
            for i, r in enumerate(rows)
        ]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return in_order(Trainer)(
        model,
        args=Config(**common(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )


def examples_of(trainer: Any, kind: str) -> tuple[list[Example], list[bool]]:
    """The rows as TRL tokenized them."""
    made, labels = [], []
    for number, row in enumerate(trainer.train_dataset, start=1):
        if kind == "kto":
            made.append(rated(row["prompt_ids"], row["completion_ids"], number))
            labels.append(row["label"])
        elif kind in ("orpo", "simpo"):
            n = sum(label == IGNORED for label in row["chosen_labels"])
            sides = (row["chosen_input_ids"], row["rejected_input_ids"])
            assert sides[0][:n] == sides[1][:n]
            made.append(pair(sides[0][:n], sides[0][n:], sides[1][n:], number))
        else:
            made.append(pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], number))
    return made, labels


@pytest.mark.parametrize(("ours", "theirs"), VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_fifty_steps_are_those_of_trl(
    ours: dict[str, Any], theirs: dict[str, Any], shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setattr("nybble.training.dataloader.epoch_order", lambda n, _seed, _epoch: torch.arange(n))
    base = shared_data / "models" / "stories260K"
    kind = ours["objective"]
    trainer = trl_trainer(kind, base, tmp_path / "trl", theirs)
    examples, labels = examples_of(trainer, kind)
    model = ours_of(base, trainer.model)
    objective = objective_of(PreferencesSection(**ours), model, trainer.processing_class, examples, labels)
    trainer.train()
    logged = trained(model, trainer.processing_class, examples, objective, tmp_path / "run")
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == len(expected) == STEPS
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(logged, expected, strict=True)]
    assert abs(logged[-1]["loss"] - logged[0]["loss"]) > 1e-3
    assert max(apart) <= 1e-5 + 1e-5 * abs(expected[0]["loss"])
    for name in set(logged[0]["figures"]) & set(expected[0]):
        assert logged[-1]["figures"][name] == pytest.approx(expected[-1][name], rel=1e-3, abs=1e-4), name


def _gradients(
    model: Any, objective: Any, examples: Sequence[Example], collate: Any
) -> tuple[float, list[torch.Tensor]]:
    batch = objective.collate(collate([Groups([e])[0] for e in examples]))
    places = tuple(range(len(examples)))
    sizes = batch["answer_lengths"]
    n_pairs = len(sizes) // 2
    counts = (torch.tensor(float(n_pairs)), torch.tensor(float(len(batch["targets"]))))
    loss, _figures = objective(model, {**batch, **objective.beside(places)}, counts)
    weights = [p for p in model.parameters() if p.requires_grad]
    return loss.item(), list(torch.autograd.grad(loss, weights))


@pytest.mark.parametrize("settings", [{"objective": "dpo", "rpo_alpha": 0.5, "ld_alpha": 0.2}, {"objective": "orpo"}])
def test_a_shared_prompt_rows_apart_and_padded_rows_give_the_same(settings: dict[str, Any], shared_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = shared_data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [{k: tokenizer(v)["input_ids"] for k, v in row.items()} for row in texts(4)]
    examples = [pair(r["prompt"], r["chosen"][1:], r["rejected"][1:], n) for n, r in enumerate(ids, 1)]
    section = PreferencesSection(**settings)
    found = []
    for collate in (FlatBatch(), FlatBatch(trees=False), PadBatch(0)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if isinstance(collate, FlatBatch):
            swap_blocks(model, "float32")
        torch.manual_seed(1)
        model = attach(model, LoraSection(r=4, lora_dropout=0.0, target_modules="all-linear"), "a/base")
        torch.manual_seed(2)
        start = Start(model)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter += 0.02 * torch.randn(parameter.shape)
        reference = Reference(examples, 2, AnswerScorer(model, tokenizer, torch.float32, section.ld_alpha), start)
        reference.complete(model, range(4))
        found.append(_gradients(model, PairObjective(section, reference), examples, collate))
    shared, apart, padded = found
    for loss, gradients in (apart, padded):
        assert loss == pytest.approx(shared[0], rel=1e-5)
        largest = max(float(g.abs().max()) for g in shared[1])
        assert max(float((a - b).abs().max()) for a, b in zip(gradients, shared[1], strict=True)) < 2e-5 * largest


def test_what_runs_out_of_memory_is_repeated_with_the_same_result(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nybble.recipe import StepMemory

    base = shared_data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [{k: tokenizer(v)["input_ids"] for k, v in row.items()} for row in texts()]
    examples = [pair(r["prompt"], r["chosen"][1:], r["rejected"][1:], n) for n, r in enumerate(ids, 1)]
    memory = StepMemory((1, 10_000), ((1, *[1] * 5),) * 2, 0)
    call = PairObjective.__call__
    left = []
    for name, fails in (("whole", 0), ("torn", 2)):
        calls: list[int] = []

        def run_out(self: PairObjective, *given: Any, fails: int = fails, calls: list[int] = calls) -> Any:
            done = call(self, *given)
            calls.append(1)
            if len(calls) == fails:
                raise torch.OutOfMemoryError("HIP out of memory")
            return done

        monkeypatch.setattr(PairObjective, "__call__", run_out)
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        swap_blocks(bare, "float32")
        torch.manual_seed(1)
        model = attach(bare, LoraSection(r=4, lora_dropout=0.1, target_modules="all-linear"), "a/base")
        objective = objective_of(PreferencesSection(objective="dpo"), model, tokenizer, examples)
        how = {"steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "step_memory": memory}
        trained(model, tokenizer, examples, objective, tmp_path / name, **how)
        assert len(calls) == (5 if fails else 4)
        left.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))
