"""Predicted against measured live tensors: the definition of a right plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nybble.data import Example, Examples, FlatBatch, Groups, PadBatch
from nybble.data.encode import EncodedRow
from nybble.data.store import to_records
from nybble.data.tree import merge_contexts
from nybble.hardware import detect_device
from nybble.kernels import Choice, dispatcher
from nybble.models import MEMORY_SAVERS, MemorySavers, attach, find_model, load_model, materialize, meta_model
from nybble.nn.workspace import workspace
from nybble.planning.chosen_layers import chosen
from nybble.planning.devices import named_profile
from nybble.planning.extrapolate import StepAtLevels, TracedModel
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.phases import Batches, Forecast
from nybble.planning.planner import make_plan
from nybble.planning.search import changed, choose, largest_length, plan_levels, smallest_peak
from nybble.planning.traced_step import BatchShape, StepCost, adopt, batch_of, reusing, run_steps
from nybble.recipe import Recipe, StepMemory, load_recipe
from nybble.run.directory import RunDirectory
from nybble.run.record import Silent
from nybble.training import train_model
from tools.families import tiny_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "head_dim": 16,
}
ROWS = BatchShape((40, 24, 33), 60)


def setting_of(kind: str = "llama", method: str = "qlora", **changes: Any) -> TracedModel:
    lora = {"r": 4, "lora_dropout": 0.1, "target_modules": "q_proj,down_proj"} if method != "full" else {}
    recipe = load_recipe(None, {"method": method, **lora})
    return TracedModel(AutoConfig.for_model(kind, **{**SIZES, **changes}), recipe, torch.bfloat16)


def padding() -> TracedModel:
    """A family whose attention does not go through transformers' interface, so that its rows are padded."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    recipe = load_recipe(None, {"method": "lora", "target_modules": "all-linear"})
    return TracedModel(AutoConfig.for_model("falcon", **sizes), recipe, torch.bfloat16)


def measured(
    setting: TracedModel, rows: BatchShape, depth: int, names: tuple[str, ...] = ()
) -> tuple[StepCost, StepCost]:
    """The first and a later step of the whole model on real tensors."""
    model = meta_model(setting.config, setting.recipe, setting.dtype)
    batch = batch_of(model, rows)
    materialize(model)
    with reusing():
        savers = MemorySavers(model)
        savers.apply(names)
        live = MemoryTracer()
        adopt(live, model, savers)
        first, later = run_steps(live, model, batch, depth, setting.dtype, savers=savers)
    return first, later


@pytest.mark.parametrize("depth", [0, 4, 7])
@pytest.mark.parametrize(
    ("kind", "method", "changes"),
    [
        ("llama", "qlora", {}),
        ("llama", "full", {"tie_word_embeddings": True}),
        ("qwen2", "lora", {"vocab_size": 4096, "tie_word_embeddings": True}),
        ("gemma3_text", "qlora", {"sliding_window": 16}),
        ("falcon", "lora", {}),
        ("mixtral", "full", {"num_local_experts": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_predicted_peak_is_that_of_real_tensors(
    kind: str, method: str, changes: dict[str, Any], depth: int
) -> None:
    setting = padding() if kind == "falcon" else setting_of(kind, method, **changes)
    first, later = measured(setting, ROWS, depth)
    curve = StepAtLevels(setting, ROWS)
    assert curve.steady(depth).peak.total_bytes == pytest.approx(later.peak.total_bytes, rel=0.01)
    assert curve.first(depth).peak.total_bytes == pytest.approx(first.peak.total_bytes, rel=0.01)


def test_each_level_takes_less_and_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.models.blocks.mlp._TILE_ROWS", 64)
    monkeypatch.setattr("nybble.models.memory_savers._SLICE_ELEMENTS", 1 << 14)
    batch = BatchShape((200, 190, 120), 400)
    setting = setting_of(vocab_size=4096, hidden_size=128, intermediate_size=512)
    forecast = Forecast(setting, Batches(batch, batch, batch), named_profile("rtx4090"))
    found = plan_levels(choose(forecast, 1, 1))
    assert [level.name for level in found[2:]] == list(MEMORY_SAVERS)
    for n_savers in range(1, len(MEMORY_SAVERS) + 1):
        _, later = measured(setting, batch, 7, tuple(MEMORY_SAVERS)[:n_savers])
        level = found[1 + n_savers]
        assert level.live_bytes == pytest.approx(later.peak.total_bytes, rel=0.003), level.name
        assert level.host_bytes == pytest.approx(later.host_bytes, rel=0.01), level.name
        assert level.live_bytes < found[n_savers].live_bytes, level.name


def test_rungs_are_taken_in_their_order_and_only_when_needed() -> None:
    batch = BatchShape((2048,) * 2)
    setting = setting_of(vocab_size=4096, hidden_size=128, intermediate_size=512, max_position_embeddings=4096)
    forecast = Forecast(setting, Batches(batch, batch, batch), named_profile("rtx4090"))
    peaks = [level.peak_bytes for level in plan_levels(choose(forecast, 1, 1))]
    assert peaks == sorted(peaks, reverse=True)
    for n, peak in enumerate(peaks):
        chosen = choose(forecast, peak, 1)
        assert chosen.savers == tuple(MEMORY_SAVERS)[: max(0, n - 1)]
        assert chosen.depths[1] >= 6 if n else chosen.depths[1] == 0
    assert forecast.profile.shares_memory is False
    on_cpu = replace(forecast, setting=replace(setting, shares_memory=True, traces={}))
    assert choose(on_cpu, 1, 1).savers == ("tiles", "slices")
    for changes in ({"lean": "never"}, {"gradient_checkpointing": "never"}):
        recipe = changed(setting.recipe, "training", **changes)
        assert choose(replace(forecast, setting=setting.of(recipe=recipe)), 1, 1).savers == ()
    always = setting.of(recipe=changed(setting.recipe, "training", lean="always"))
    assert choose(replace(forecast, setting=always), 1 << 40, 1).savers == tuple(MEMORY_SAVERS)


def test_parts_add_up_and_are_what_they_are_called() -> None:
    setting = setting_of()
    work = StepAtLevels(setting, ROWS).steady(3)
    for peak in work.peaks.values():
        assert sum(peak.parts.values()) == peak.total_bytes
    trainable, _ = setting.parameters
    assert work.rest["adapters"] == 4 * trainable
    assert work.rest["optimizer"] == pytest.approx(8 * trainable, rel=0.01)
    assert work.peaks["update"].parts["gradients"] == 4 * trainable


def test_recomputation_costs_work_and_saves_memory() -> None:
    curve = StepAtLevels(setting_of(), BatchShape((512,) * 2))
    works = [curve.steady(depth) for depth in range(8)]
    peaks = [work.peak.total_bytes for work in works]
    assert peaks == sorted(peaks, reverse=True)
    flops = [work.flops for work in works]
    assert flops == sorted(flops)
    assert flops[7] > 1.2 * flops[0]


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_the_prediction_holds_for_the_trainer(tiny_llama: Callable[..., Path], tmp_path: Path, recompute: str) -> None:
    folder = tiny_llama()
    recipe = load_recipe(None, _training(folder, tmp_path))
    source = find_model(recipe.model)
    setting = TracedModel(source.config, recipe, torch.bfloat16)
    depth = setting.n_layers if recompute == "all" else 0
    rows = BatchShape((60, 60), 2 * 59)
    expected = StepAtLevels(setting, rows).steady(depth).peak.total_bytes
    model = _model(recipe)
    live = MemoryTracer()
    adopt(live, model)
    with live:
        live.start("train")
        _train(model, recipe, tmp_path, [60] * 4, _at_depth(depth, setting.n_layers))
    workspace.clear()
    assert expected == pytest.approx(live.peaks["train"].total_bytes, rel=0.01)


# On a GPU, from torch's allocator on a CPU, from oneDNN, and from our C.
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("injected"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("could not create a primitive"),
        MemoryError("no memory for 3 rows of 4 numbers"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_batch_that_runs_out_of_memory_is_taken_again_and_learns_the_same(
    error: Exception, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    results, notes = [], []
    for fails in (False, True):
        recipe = load_recipe(None, {**_training(tiny_llama(), tmp_path / str(fails)), "gradient_accumulation_steps": 2})
        torch.manual_seed(1)
        model = _model(recipe)
        layers = model.get_base_model().model.layers
        fault = _FaultOnce(error)
        if fails:
            layers[0].register_forward_hook(fault)
        observer = _Notes()
        memory = _at_depth(0, len(layers))
        _train(model, recipe, tmp_path / str(fails), [60, 50, 40, 30] * 2, memory, observer)
        notes.append(observer.notes)
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        assert fault.happened == fails
    assert notes[0] == []
    assert len(notes[1]) == 1
    assert "memory ran out at step 1" in notes[1][0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_that_never_fits_ends_in_one_line(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from nybble.errors import CannotRunError

    recipe = load_recipe(None, _training(tiny_llama(), tmp_path))
    model = _model(recipe)
    model.get_base_model().model.layers[0].register_forward_hook(_Fault())
    with pytest.raises(CannotRunError, match="out of memory"):
        _train(model, recipe, tmp_path, [60] * 4, _at_depth(0, 2))


def test_depth_follows_the_room_and_lines_lie_above_the_curve() -> None:
    memory = StepMemory((10, 110), ((1000, 1000, 1000), (5000, 3000, 1500)), 500)
    assert memory.above_base(110, 0) == 4500
    assert memory.above_base(60, 0) == 2500
    assert memory.above_base(210, 0) == 8500  # the last line goes on
    assert memory.above_base(1, 0) == 500  # fewer tokens than any batch seen count as that
    assert [memory.level_for(110, room) for room in (4500, 4499, 2500, 2499, 0)] == [0, 1, 1, 2, 2]
    curve = StepAtLevels(setting_of(), BatchShape((128,) * 2))
    ends = {n: StepAtLevels(curve.setting, BatchShape((n,) * 2)).peaks[2] for n in (16, 256)}
    line = StepMemory((32, 512), ((ends[16],), (ends[256],)), 0).above_base(256, 0)
    assert curve.peaks[2] <= line <= 1.02 * curve.peaks[2]


def test_a_choice_is_within_the_budget_and_no_shallower_one_is() -> None:
    setting, profile = setting_of(), named_profile("rtx4090")
    batch = BatchShape((256,) * 2)
    forecast = Forecast(setting, Batches(batch, batch, BatchShape((256,))), profile)
    none, every = (forecast.total(forecast.longest.steady(depth).peak) for depth in (0, 7))
    budget = (none + every) // 2
    chosen = choose(forecast, budget, 1)
    assert chosen.fits
    assert 0 < chosen.longest_level < 7
    assert max(phase.peak_bytes for phase in chosen.phases) <= budget
    assert forecast.total(forecast.longest.steady(chosen.longest_level - 1).peak) > budget
    assert choose(forecast, none, 1).longest_level == 0
    assert not choose(forecast, profile.context_bytes, 1).fits


@pytest.mark.parametrize("device", ["rtx4090", "strix-halo"])
def test_a_checkpoint_is_written_from_a_copy_that_takes_room_where_the_host_is_the_device(device: str) -> None:
    setting = setting_of()
    batch, copy = BatchShape((256,) * 2), 12 * setting.parameters[0]  # adapters and Adam's two moments
    found = {}
    for save_steps in (5, 10):
        recipe = changed(setting.recipe, "training", max_steps=10, save_steps=save_steps)
        forecast = Forecast(setting.of(recipe=recipe), Batches(batch, batch, batch), named_profile(device))
        chosen = choose(forecast, 1 << 40, 1)
        live = {phase.name: phase.live_bytes for phase in chosen.phases}
        found[save_steps] = live["checkpoint"] - copy * forecast.profile.shares_memory
        longest = live["longest batch"]
        # The longest batch fits beside the copy, or a layer more is recomputed.
        budget = next(phase.peak_bytes for phase in chosen.phases if phase.name == "longest batch")
        is_beside = save_steps < 10 and forecast.profile.shares_memory
        assert choose(forecast, budget, 1).longest_level == int(is_beside)
    rest = sum(forecast.average.steady(0).rest[part] for part in ("weights", "adapters", "optimizer"))
    assert found[10] == pytest.approx(rest, rel=0.001)  # the last one, with nothing beside it
    assert found[5] == (longest if device == "strix-halo" else found[10])


def test_the_largest_length_fits_and_a_longer_one_does_not() -> None:
    setting, profile = setting_of(max_position_embeddings=4096), named_profile("rtx4090")

    def forecast(length: int) -> Forecast:
        batch = BatchShape((length,) * 2)
        return Forecast(setting, Batches(batch, batch, batch), profile)

    budget = smallest_peak(forecast(1024))
    length = largest_length(forecast(1024), budget)
    assert length is not None
    assert length >= 960  # may be above: a few more rows make the pieces of the loss smaller
    assert smallest_peak(forecast(length)) <= budget < smallest_peak(forecast(length + length // 16))


def test_the_proposed_changes_are_smaller_than_what_does_not_fit_and_fit_where_they_say_so() -> None:
    """The batch is split and every saver taken already: what is proposed is measured against that."""
    recipe = load_recipe(None, {"per_device_train_batch_size": 2, "r": 64, "target_modules": "all-linear"})
    config = AutoConfig.for_model("llama", **SIZES)
    rows = BatchShape((40,) * 2)
    profile, batches = named_profile("rtx4090"), Batches(rows, rows, rows)
    smallest = make_plan(
        budgeted(recipe, 1), config, profile, batches
    )  # all that is neutral is done where nothing fits
    budget = max(phase.peak_bytes for phase in smallest.phases) * 499 // 500
    made = make_plan(budgeted(recipe, budget), config, profile, batches)
    assert not made.fits
    assert made.micro_batch == 1
    peak = max(phase.peak_bytes for phase in made.phases)
    changes = {change.setting: change for change in made.cheapest_changes}
    assert "per_device_train_batch_size" not in changes  # one row goes through at a time already
    assert changes["r"].fits
    assert all(change.peak_bytes < peak for change in changes.values())
    smaller = changed(budgeted(recipe, budget), "lora", r=8)
    assert make_plan(smaller, config, profile, batches).fits


def budgeted(recipe: Recipe, n_bytes: int) -> Recipe:
    return changed(recipe, "training", memory_budget=n_bytes)


class _Fault:
    """A layer's hook: memory runs out in every forward pass."""

    def __call__(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("injected")


class _FaultOnce:
    """A layer's hook: memory runs out in the second micro-batch's backward pass, where gradients are half made."""

    def __init__(self, error: Exception) -> None:
        self.calls, self.happened, self.error = 0, False, error

    def __call__(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            (output[0] if isinstance(output, tuple) else output).register_hook(self._fail)
            self.happened = True

    def _fail(self, _: Any) -> None:
        raise self.error


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _training(folder: Path, out: Path) -> dict[str, Any]:
    names = {"model_name_or_path": str(folder), "output_dir": str(out), "device": "cpu", "report_to": "none"}
    lora = {"lora_dropout": 0.1, "r": 4, "target_modules": "q_proj"}
    return {**names, **lora, "per_device_train_batch_size": 2, "max_steps": 2}


def _model(recipe: Recipe) -> Any:
    source = find_model(recipe.model)
    base, _ = load_model(source, recipe.method, recipe.model, recipe.quantization, detect_device("cpu"))
    return attach(base, recipe.lora, source.name)


def _at_depth(depth: int, n_layers: int) -> StepMemory:
    """By which just this depth is the first that fits."""
    row = tuple(0 if d >= depth else 1 << 60 for d in range(n_layers + 1))
    return StepMemory((1, 2), (row, row), 0)


def _train(
    model: Any, recipe: Recipe, out: Path, lengths: list[int], memory: StepMemory, observer: Silent | None = None
) -> None:
    rows = [Example([5] * n, [5] * n, 1, 1, 0, (2,), 0, 0, False) for n in lengths]
    out.mkdir(exist_ok=True)
    device = detect_device("cpu")
    train_model(
        model,
        None,
        Groups(rows),
        recipe.training,
        run=RunDirectory(out),
        device=device,
        compute_dtype=torch.bfloat16,
        max_steps=2,
        observer=observer,
        step_memory=memory,
    )


def _trees(*contexts: list[tuple[int, int, int]]) -> Examples:
    """Examples whose contexts share a prefix: (shared tokens, own tokens, learned of them) of each context."""
    made = []
    for number, parts in enumerate(contexts):
        rows = []
        for at, (shared, own, learned) in enumerate(parts):
            ids = [5] * shared + [6 + at] * own
            rows.append((ids, [-100] * (len(ids) - learned) + ids[len(ids) - learned :]))
        ids, labels, segments = merge_contexts(rows)
        example = Example(ids, labels, 1, 1, 0, (2,), 0, 0, False, number + 1, None, segments)
        made.append(EncodedRow([example], len(ids), 1, number, ""))
    return Examples([to_records(made)])


def test_trees_are_planned_as_batches_hold_them() -> None:
    examples = _trees([(40, 9, 4), (40, 20, 20), (25, 7, 3)], [(10, 5, 5)], [(30, 8, 8), (30, 16, 2)])
    recipe = load_recipe(None, {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3})
    batches = Batches.of(SimpleNamespace(train=examples, held_out=examples), None, recipe)  # type: ignore[arg-type]
    groups = Groups(examples)
    for rows, drawn in ((batches.longest, (0, 2)), (batches.evaluation, (0, 2, 1))):
        assert rows.learned == sum(examples[i].n_trained for i in drawn)
        for setting, collate in ((setting_of(), FlatBatch()), (padding(), PadBatch(0))):
            real = collate([groups[i] for i in drawn])["input_ids"]
            assert setting.laid_out(rows) == real.numel()
            model = meta_model(setting.config, setting.recipe, setting.dtype)
            assert batch_of(model, rows)["input_ids"].shape == real.shape
    assert batches.average.lengths == (48, 49)  # 76, 15 and 54 tokens
    assert batches.average.unfolded == ((2, 40), (2, 40))  # 3, 1 and 2 rows, of 60, 15 and 46 tokens at most
    assert batches.longest.first(1, None).padded == (60, 60, 60)


@pytest.mark.parametrize("path", [None, "sdpa"])
def test_a_step_over_trees_takes_no_more_than_the_plan_of_so_many_tokens(path: str | None) -> None:
    if path:
        dispatcher.choose(torch.device("cpu"), {"attend": Choice(path, "as asked")})
    examples = _trees([(150, 9, 4), (150, 20, 20), (100, 7, 3), (150, 30, 30)], [(90, 40, 8), (90, 50, 2)])
    groups = Groups(examples)
    setting, depth = setting_of(num_hidden_layers=3), 2
    batch = FlatBatch()([groups[0], groups[1]])
    model = meta_model(setting.config, setting.recipe, setting.dtype)
    materialize(model)
    with reusing():
        live = MemoryTracer()
        adopt(live, model, MemorySavers(model))
        _first, later = run_steps(live, model, batch, depth, setting.dtype)
    lengths = tuple(examples.column("length").tolist())
    planned = StepAtLevels(setting, BatchShape(lengths, int(examples.column("n_trained").sum())))
    assert later.peak.total_bytes <= 1.01 * planned.steady(depth).peak.total_bytes


@pytest.mark.parametrize(
    ("kind", "depth", "changes"),
    [
        ("gemma3_text", 5, {"sliding_window": 16}),
        ("deepseek_v3", 0, {"first_k_dense_replace": 2, "num_hidden_layers": 7}),
        ("bamba", 0, {"attn_layer_indices": [2, 5], "num_hidden_layers": 7}),
        ("gpt2", 3, {"n_layer": 6}),
    ],
)
def test_layers_of_several_kinds_take_what_a_trace_of_all_takes(kind: str, depth: int, changes: dict[str, Any]) -> None:
    """Kinds of attention, dense layers before experts, Mamba layers between, a tuple as a layer's result."""
    if kind == "gemma3_text":
        setting = setting_of(kind, **changes)
    else:
        fields = {k: v for k, v in tiny_config(kind, 512).to_dict().items() if k not in ("n_layer", "layer_types")}
        recipe = load_recipe(None, {"r": 4, "target_modules": "all-linear"})
        setting = TracedModel(AutoConfig.for_model(**{**fields, "model_type": kind, **changes}), recipe, torch.bfloat16)
    n = len(setting.kinds)
    few = chosen(setting.kinds, depth)
    assert len(few.layers) < n - 1
    assert few.more
    whole, _ = setting.trace(ROWS, range(n), depth)
    reduced = StepAtLevels(setting, ROWS).steady(depth)
    assert reduced.peak.total_bytes == pytest.approx(whole.peak.total_bytes, rel=0.003)
    assert reduced.flops == pytest.approx(whole.flops, rel=0.003)


def test_chosen_layers_are_the_first_and_last_of_each_kind_at_any_depth() -> None:
    kinds = (0, 0, 1) * 4
    few = chosen(kinds, 6)
    assert few.stand_for == (0, 2, 4, 5, 6, 8, 10, 11)
    assert [kinds[n] for n in few.layers] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert few.n_recomputed == 4
    assert {one.group: one.n_left for one in few.more} == {(0, True): 2, (0, False): 2}
    assert chosen((0, 1, 0, 1), 2).layers == (0, 1, 2, 3)
    assert chosen((), 0).layers == ()


def test_a_family_whose_layers_are_not_recomputed_has_one_level() -> None:
    recipe = load_recipe(None, {"r": 4, "target_modules": "all-linear"})
    plan = make_plan(recipe, tiny_config("ctrl", 512), named_profile("rtx4090"), Batches(ROWS, ROWS, ROWS))
    assert plan.n_layers == 0
    assert plan.recompute_layers == 0
    assert plan.fits
