"""Trees of contexts against the separate rows that they stand for: losses, gradients, evaluation, and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.data import IGNORED, Example, FlatBatch, Groups, PadBatch, pack_rows
from nybble.data.encode import EncodedRow
from nybble.data.store import Examples, to_records
from nybble.data.tree import merge_contexts, unfold
from nybble.models import attach, blocks_of, choice_for, swap_blocks
from nybble.nn.recompute import recomputed
from nybble.recipe import EvaluationSection, LoraSection, TrainingSection
from nybble.run.processes import Processes
from nybble.training.dataloader import StepLoader
from nybble.training.evaluate import evaluate
from nybble.training.parity import compare

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Windows are shorter than most paths, so that one which forgot what a branch continues would show.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"partial_rotary_factor": 0.5},
}


def conversation(seed: int, n_answers: int = 4, vocabulary: int = 300) -> Example:
    """Answers whose reasoning the template drops once the next question follows: each has a context of its own."""
    random = Random(seed)

    def words(most: int) -> list[int]:
        return [random.randrange(3, vocabulary) for _ in range(random.randint(1, most))]

    history = [1]
    contexts = []
    for _ in range(n_answers):
        prompt, reasoning, answer = history + words(8), words(9), [*words(5), 2]
        contexts.append((prompt + reasoning + answer, [IGNORED] * len(prompt) + reasoning + answer))
        history = prompt + answer
    ids, labels, segments = merge_contexts(contexts)
    assert segments
    return Example(ids, labels, n_answers, n_answers, 0, (2,), 0, len(ids) - 2, False, seed, None, segments)


def plain(seed: int, length: int) -> Example:
    ids = [Random(seed).randrange(3, 300) for _ in range(length)]
    return Example(ids, [i if n % 3 else IGNORED for n, i in enumerate(ids)], 1, 0, 0, (2,), 0, 1, False, seed)


def apart(examples: Sequence[Example]) -> list[Example]:
    return [
        replace(e, input_ids=ids, labels=labels, segments=())
        for e in examples
        for ids, labels in unfold(e.input_ids, e.labels, e.segments)
    ]


def grouped(examples: Sequence[Example]) -> list[Any]:
    groups = Groups(examples)
    return [groups[i] for i in range(len(groups))]


def adapted(model: Any) -> Any:
    """With adapters that do something; with our blocks in float64."""
    from peft import LoraConfig, get_peft_model

    if blocks_of(model).flattened:
        model = attach(model, LoraSection(r=4, lora_alpha=8, target_modules="all-linear"), "a/base")
    else:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return (model.double() if blocks_of(model).flattened else model).train()


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    n = int((batch["labels"][:, 1:] != IGNORED).sum())
    loss = model(**batch, num_items_in_batch=n).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def largest_relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name].to(a[name].dtype)).norm() / a[name].norm()) for name in a)


def both(model: Any) -> tuple[Any, Any]:
    """The model on padded rows with transformers' and PEFT's own code, and with our blocks."""
    ours = copy.deepcopy(model)
    assert swap_blocks(ours).flattened
    return adapted(model), adapted(ours)


def check(stock: Any, ours: Any, examples: Sequence[Example]) -> None:
    """Gradients of our blocks are float64, and the sum of a loss is float32; transformers computes in float32."""
    tree, separate = FlatBatch()(grouped(examples)), FlatBatch()(grouped(apart(examples)))
    assert len(tree["input_ids"][0]) < len(separate["input_ids"][0])
    assert sorted(tree["targets"].tolist()) == sorted(separate["targets"].tolist())
    loss, found = gradients(ours, tree)
    separate_loss, expected = gradients(ours, separate)
    assert loss == pytest.approx(separate_loss, rel=1e-6)
    assert largest_relative(expected, found) < 1e-10
    padded_loss, padded = gradients(stock, PadBatch(0)(grouped(examples)))
    assert gradients(stock, PadBatch(0)(grouped(apart(examples))))[0] == padded_loss
    assert loss == pytest.approx(padded_loss, rel=1e-5)
    assert largest_relative(padded, found) < 5e-5  # measured 1e-6 to 4e-6, of trained weights 1.5e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma:UserWarning")
def test_a_tree_has_the_loss_and_gradients_of_its_rows(family: str) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, **WINDOWS.get(family, {})})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=choice_for(config)).float()
    stock, ours = both(model)
    check(stock, ours, [conversation(1), plain(5, 17), conversation(2), conversation(3, n_answers=2)])


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_a_trained_model_learns_the_same_from_a_tree(name: str, shared_data: Path) -> None:
    folder = shared_data / "models" / name
    if not folder.is_dir():
        pytest.skip(f"model {name} is absent")
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    stock, ours = both(model)
    vocabulary = model.config.vocab_size
    check(stock, ours, [conversation(seed, n_answers=n, vocabulary=vocabulary) for seed, n in ((7, 5), (8, 3))])


@pytest.fixture
def models() -> tuple[Any, Any]:
    return both(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).float())


def test_recomputed_layers_give_the_same_bits(models: tuple[Any, Any]) -> None:
    ours = models[1].float()
    batch = FlatBatch()(grouped([conversation(1), conversation(2)]))
    _, plain_bits = gradients(ours, batch)
    for layer in ours.get_base_model().model.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, recomputed
    _, again = gradients(ours, batch)
    assert all(torch.equal(plain_bits[name], again[name]) for name in plain_bits)


@pytest.mark.parametrize("flattened", [True, False])
def test_an_evaluated_tree_has_the_summed_loss_of_its_rows(models: tuple[Any, Any], flattened: bool) -> None:
    from types import SimpleNamespace

    model = models[flattened]
    section = EvaluationSection(per_device_eval_batch_size=2)
    examples = [conversation(1), plain(2, 9), conversation(3), conversation(4, n_answers=2)]
    tokenizer = SimpleNamespace(pad_token_id=0)
    measured = evaluate(model, tokenizer, examples, section, torch.float32)
    separate = evaluate(model, tokenizer, apart(examples), section, torch.float32)
    assert measured is not None
    assert separate is not None
    assert measured.n_tokens == separate.n_tokens
    assert measured.loss == pytest.approx(separate.loss, rel=1e-6)
    summed: dict[int, float] = {}
    for row in separate.rows:
        summed[row.row] = summed.get(row.row, 0.0) + row.loss
    assert [row.loss for row in measured.rows] == pytest.approx(list(summed.values()), rel=1e-6)


def test_the_reference_check_compares_trees_with_padded_rows(models: tuple[Any, Any]) -> None:
    batch = FlatBatch()(grouped([conversation(1), plain(2, 9), conversation(3)]))
    n = torch.tensor(float(len(batch["targets"])))
    found = compare(models[1], batch, n, torch.float32)
    assert found.loss_difference < 1e-5
    assert 0 < found.gradient_difference < 1e-5
    batch["parents"] = tuple(-1 if parent == 0 else parent for parent in batch["parents"])
    assert compare(models[1], batch, n, torch.float32).loss_difference > 1e-3


def test_packed_trees_and_rows_learn_what_they_learn_apart(models: tuple[Any, Any]) -> None:
    examples = [conversation(1), plain(5, 17), conversation(2), plain(6, 4), conversation(3, n_answers=2)]
    packs = pack_rows([len(example.input_ids) for example in examples], 96)
    assert 1 < len(packs) < len(examples)
    packed = Groups(examples, packs)
    loss, found = gradients(models[1], FlatBatch()([packed[n] for n in range(len(packed))]))
    expected_loss, expected = gradients(models[1], FlatBatch()(grouped(examples)))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert largest_relative(expected, found) < 1e-10
    assert sorted(row for n in range(len(packed)) for row in packed.rows(n)) == sorted(e.row for e in examples)


def test_processes_share_trees_as_they_share_rows() -> None:
    groups = Groups([conversation(seed) for seed in range(7)])
    section = TrainingSection(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    alone = StepLoader(groups, FlatBatch(), section.model_copy(update={"gradient_accumulation_steps": 4}))
    shared = [StepLoader(groups, FlatBatch(), section, Processes(rank, 2)) for rank in range(2)]
    for step in range(2):
        whole = alone.micro_batches_of(step)
        parts = [batch for loader in shared for batch in loader.micro_batches_of(step)]
        assert sum(batch.n_learned for batch in parts) == sum(batch.n_learned for batch in whole)
        assert sum(batch.n_tokens for batch in parts) == sum(batch.n_tokens for batch in whole)
        for batch in whole:
            assert batch.n_learned == len(batch.inputs["targets"])


def test_resumed_on_trees_is_the_undisturbed_training(
    world: Callable[..., Any],
    stop_after: Callable[[int | None], None],
    stopped: Callable[..., Path],
    everything: Callable[[Path], dict[str, Any]],
    assert_same: Callable[[dict[str, Any], dict[str, Any]], None],
    tmp_path: Path,
) -> None:
    made = world()
    trees = [conversation(seed, vocabulary=60) for seed in range(1, 15)]
    rows = (EncodedRow([tree], len(tree.input_ids), tree.n_answers, seed, "") for seed, tree in enumerate(trees))
    made.prepared = replace(made.prepared, train=Examples([to_records(rows)]))
    stop_after(None)
    made.train(tmp_path / "straight")
    out = stopped(made, tmp_path / "out", at=5)
    made.train(out, resume=True)
    assert_same(everything(out), everything(tmp_path / "straight"))
