"""Merging by the command line: what is written is what was trained, and what is not is said to be so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nybble as library
from nybble.exporting import arithmetic
from nybble.exporting.arithmetic import AdapterDelta, write_merged
from nybble.models import BaseWeights, find_artifact, find_model, weights_hash
from nybble.models import base_weights as weights_module
from nybble.recipe import load_recipe

FAST = {
    "learning_rate": 1e-2,
    "max_steps": 40,
    "max_new_tokens": 12,
    "n_samples": 0,
    "device": "cpu",
    "report_to": "none",
}
IDS = torch.arange(4, 36).view(2, 16)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 questions, of which the same always has the same answer."""
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"text": f"<s>[INST] What is {words[i % 8]}? [/INST] It is {words[(i + 1) % 8]}. </s>"} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], rows: Path
) -> Callable[..., Path]:
    """`trained(**settings)` -> a run with a base of its own; made once: do not write."""
    made: dict[str, Path] = {}

    def train(**settings: Any) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            shutil.copytree(tiny_llama(), folder / "base")
            names = {"model_name_or_path": folder / "base", "dataset_name": rows, "output_dir": folder / "run"}
            values = {**FAST, **{name: str(path) for name, path in names.items()}, **settings}
            library.train(load_recipe(None, values))
            made[key] = folder / "run"
        return made[key]

    return train


def peft_logits(run: Path, base: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stock PEFT's merge over a stock float32 model with the weights `base` in it."""
    from peft import PeftModel

    source = find_artifact(str(run)).original.model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, value in base.items():
            model.get_parameter(name).copy_(value)
    merged = PeftModel.from_pretrained(model, run / "adapter").merge_and_unload()
    return merged.eval()(IDS).logits.detach()


def written(run: Path, out: Path, target: str, dtype: torch.dtype = torch.float32) -> Any:
    """The merged tensors in a stock model, without verification."""
    tuned = find_artifact(str(run))
    source = find_model(tuned.base if target == "dequantized" else tuned.original)
    packing = (tuned.quantization, torch.bfloat16) if target == "dequantized" else ()
    out.mkdir()
    with BaseWeights(source, *packing) as base, AdapterDelta(tuned.folder) as delta:
        write_merged(base, delta, out, dtype)
    source = find_model(tuned.original)
    source.config.save_pretrained(out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def decoded(run: Path) -> dict[str, torch.Tensor]:
    """What the packed base of a run holds, by loading it as training does."""
    from nybble.hardware import detect_device
    from nybble.models import load_model
    from nybble.nn import Linear4bit

    tuned = find_artifact(str(run))
    model, _ = load_model(find_model(tuned.base), "qlora", tuned.base, tuned.quantization, detect_device("cpu"))
    packed = {f"{n}.weight": m.dequantize(torch.float32) for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return packed | {
        n: p.float() for n, p in model.named_parameters() if f"{n}" not in packed and p.is_floating_point()
    }


VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}, {"encoder": "calibrated"}, {"init_lora_weights": "pissa"}]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_merging_into_the_dequantized_base_is_pefts_merge_over_it(
    settings: dict[str, Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained(**settings)
    got = written(run, tmp_path / "out", "dequantized")(IDS).logits.detach()
    expected = peft_logits(run, decoded(run))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, peft_logits(run, {}), rtol=1e-3, atol=1e-3)  # the original is another base


@pytest.mark.parametrize("settings", VARIANTS[:3], ids=str)
def test_merging_into_the_original_is_pefts_merge_over_it(
    settings: dict[str, Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained(**settings)
    got = written(run, tmp_path / "out", "original")(IDS).logits.detach()
    torch.testing.assert_close(got, peft_logits(run, {}), rtol=1e-4, atol=1e-4)


def test_shards_are_as_large_as_allowed_and_indexed(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(trained(), tmp_path / "whole", "original")(IDS).logits
    monkeypatch.setattr(arithmetic, "SHARD_BYTES", 100_000)
    parts = written(trained(), tmp_path / "parts", "original")(IDS).logits
    shards = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert torch.equal(whole, parts)


@pytest.mark.fresh
def test_merge_measures_both_bases_writes_the_better_and_verifies_it(
    nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    run, out = trained(), tmp_path / "merged"
    done = nybble("merge", run, "--out", out, "--json")
    assert done.code == 0, done.err
    result = done.json
    assert {"mean_kl", "worst_kl", "target", "verified"} <= result.keys()
    assert result["verified"] is True
    assert [c["target"] for c in result["candidates"]] == ["dequantized", "original"]
    assert result["loss"] == min(c["loss"] for c in result["candidates"] if c["verified"])
    exact, other = result["candidates"]
    assert exact["mean_kl"] < 0.01
    assert exact["mean_kl"] < 0.1 * other["mean_kl"]
    assert exact["stopped"] == exact["stopped_reference"] > 0
    assert exact["greedy_equal"] == exact["n_prompts"] > 0
    record = json.loads((run / "run.json").read_text())
    assert exact["loss_reference"] == pytest.approx(record["eval_loss"], abs=0.02)
    assert not (out / "UNVERIFIED").exists()
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "nybble.json"} <= {
        f.name for f in out.iterdir()
    }
    assert str(run.parent) not in (out / "config.json").read_text()
    assert "## Merged" in (out / "README.md").read_text()
    assert not list(tmp_path.glob(".merged*"))
    base, tuned = nybble("ask", run, "What is two?", "--json"), nybble("ask", out, "What is two?", "--json")
    if result["target"] == "dequantized":
        assert tuned.json["answers"][0]["tuned"] == base.json["answers"][0]["tuned"]


def test_a_merge_that_is_not_what_was_trained_is_marked_and_exits_1(
    nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdapterDelta.apply

    def wrong(self: AdapterDelta, module: str, weight: torch.Tensor, *layout: bool) -> torch.Tensor:
        return weight.float() if "layers.1" in module else right(self, module, weight, *layout)

    monkeypatch.setattr(AdapterDelta, "apply", wrong)
    out = tmp_path / "merged"
    done = nybble("merge", trained(), "--out", out, "--into", "dequantized", "--json")
    assert done.code == 1
    assert done.json["verified"] is False
    assert "mean KL" in (out / "UNVERIFIED").read_text()
    assert "**Not verified**" in (out / "README.md").read_text()
    refused = nybble("export", out, "--hub", "some/name")
    assert refused.code == 2
    assert "UNVERIFIED" in refused.err


def test_4_bits_are_encoded_anew_from_the_better_base_and_keep_the_adapter(
    nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    out = tmp_path / "merged"
    done = nybble("merge", trained(), "--out", out, "--into", "4bit", "--max_loss_gap", "0.3", "--json")
    assert done.code == 0, done.err
    losses = {candidate["target"]: candidate["loss"] for candidate in done.json["candidates"]}
    assert losses.keys() == {"4bit-dequantized", "4bit-original"}
    assert done.json["target"] == min(losses, key=lambda target: losses[target])
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"] is True
    base_loss = json.loads((trained() / "run.json").read_text())["evaluation_base"]["loss"]
    assert done.json["loss"] < done.json["loss_reference"] + 0.1 * (base_loss - done.json["loss_reference"])


def test_4_bits_need_no_original(nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run, out = trained(init_lora_weights="pissa"), tmp_path / "merged"
    done = nybble("merge", run, "--out", out, "--into", "4bit", "--max_loss_gap", "9", "--json")
    assert done.code == 0, done.err
    assert done.json["target"] == "4bit-dequantized"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_4bit"] is True


def test_what_does_not_fit_into_memory_is_verified_from_disk(trained: Callable[..., Path], tmp_path: Path) -> None:
    from nybble.data import prepare_rows
    from nybble.exporting import Limits, Reference
    from nybble.hardware import detect_device
    from nybble.models import load_artifact
    from nybble.training import stop_at

    tuned, recipe = find_artifact(str(trained())), load_recipe(trained() / "recipe.yaml")
    model, tokenizer, dtype = load_artifact(tuned, detect_device("cpu"))
    stop_at(model, tuned.stop_tokens)
    held_out = prepare_rows(recipe.data, recipe.evaluation, tokenizer, recipe.training.seed).held_out
    written(trained(), tmp_path / "out", "dequantized", torch.bfloat16)
    tokenizer.save_pretrained(tmp_path / "out")
    with Reference(held_out, 4, tuned.stop_tokens) as reference:
        reference.capture(model, tokenizer, dtype)
        inside = reference.measure(tmp_path / "out", "dequantized", Limits(), "cpu")
        outside = reference.measure(tmp_path / "out", "dequantized", Limits(), "cpu", {"cpu": 60_000})
    assert outside.mean_kl == pytest.approx(inside.mean_kl, rel=1e-3)


def spoil_base(run: Path, copy: Path) -> Path:
    """A copy of a run's base with other weights in the same shapes."""
    shutil.copytree(find_artifact(str(run)).original.model_name_or_path, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({name: value + 0.01 for name, value in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    return copy


# name -> (words behind `merge RUN --out OUT`, settings of the run, exit code, what the line must say)
CASES: dict[str, tuple[list[str], dict[str, Any], int, str]] = {
    "another base": (["--model_name_or_path", "{tmp}/other"], {}, 2, "another model"),
    "rows missing": (["--dataset_name", "{tmp}/none.jsonl"], {}, 2, "does not exist"),
    "repaired adapter into the original": (
        ["--into", "original"],
        {"init_lora_weights": "pissa"},
        2,
        "only its own 4-bit base",
    ),
    "16-bit adapter into 4 bits": (["--into", "4bit"], {"method": "lora"}, 2, "nybble quantize"),
    "full training": ([], {"method": "full"}, 2, "whole model already"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line_and_leaves_nothing(
    case: str, nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    words, settings, code, says = CASES[case]
    run = trained(**settings)
    spoil_base(run, tmp_path / "other")
    out = tmp_path / "merged"
    done = nybble("merge", run, "--out", out, *(word.format(tmp=tmp_path) for word in words))
    assert done.code == code, done.err
    assert says in done.err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def copy_of(run: Path, copy: Path) -> Path:
    """A copy of a run, whose base is a copy as well: `copy/base` and `copy/run`."""
    shutil.copytree(run, copy / "run")
    shutil.copytree(find_artifact(str(run)).original.model_name_or_path, copy / "base")
    for name in ("run.json", "recipe.yaml"):
        file = copy / "run" / name
        file.write_text(file.read_text().replace(str(run.parent / "base"), str(copy / "base")))
    return copy / "run"


def add_to_one_element(file: Path, tensor: str, value: float) -> None:
    """Change the first element of a tensor in place."""
    tensors = load_file(file)
    tensors[tensor].view(-1)[0] += value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("words", [("merge", "--out"), ("export", "--gguf")], ids=" ".join)
def test_a_base_with_one_other_weight_is_another_base(
    words: tuple[str, ...], nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = copy_of(trained(), tmp_path)
    add_to_one_element(tmp_path / "base/model.safetensors", "model.layers.0.mlp.up_proj.weight", 5.0)
    done = nybble(words[0], run, *words[1:], tmp_path / "out")
    assert done.code == 2, done.err
    assert "some of its weights have changed" in done.err.splitlines()[-1]
    assert nybble("ask", run, "What is one?").code == 2
    assert not (tmp_path / "out").exists()


def test_the_same_weights_in_other_files_are_the_same_base(trained: Callable[..., Path], tmp_path: Path) -> None:
    base = find_model(find_artifact(str(trained())).original)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert weights_hash(tmp_path) == weights_hash(base.folder) == find_artifact(str(trained())).weights_hash


def test_an_adapter_that_has_not_the_loss_of_its_run_is_not_merged(
    nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = copy_of(trained(), tmp_path)
    weights = run / "adapter/adapter_model.safetensors"
    save_file({name: 3 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    done = nybble("merge", run, "--out", tmp_path / "out")
    assert done.code == 2, done.err
    assert "its run measured" in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_how_the_base_of_an_adapter_of_another_tool_was_packed_can_be_said(
    nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(trained() / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/nybble.json").unlink()
    packed = ("--method", "qlora", "--into", "dequantized")
    merged = nybble("merge", tmp_path / "adapter", "--out", tmp_path / "a", "--json", *packed)
    assert [c["target"] for c in merged.json["candidates"]] == ["dequantized"]
    assert "how its base was packed" not in merged.err
    unsaid = nybble("merge", tmp_path / "adapter", "--out", tmp_path / "b", "--json")
    assert [c["target"] for c in unsaid.json["candidates"]] == ["original"]
    assert "how its base was packed" in unsaid.err
    full = nybble("merge", tmp_path / "adapter", "--out", tmp_path / "d", "--method", "full")
    assert (full.code, "trained with lora or qlora" in full.err) == (2, True)


def test_a_full_disk_is_seen_before_anything_is_written(
    nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    done = nybble("merge", trained(), "--out", tmp_path / "merged")
    assert done.code == 3
    assert "--into dequantized needs half" in done.err
    assert not list(tmp_path.iterdir())


def test_without_the_original_the_4_bit_base_alone_will_do(
    nybble: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained(encoder="calibrated"), run)
    out = tmp_path / "merged"
    words = ["--model_name_or_path", tmp_path / "gone"]
    done = nybble("merge", run, "--out", out, "--json", *words)
    assert done.code == 0, done.err
    assert [c["target"] for c in done.json["candidates"]] == ["dequantized"]
    assert "only the dequantized base is tried" in done.err


def test_a_run_without_an_adapter_and_no_run_are_refused(
    nybble: Callable[..., Any], trained: Any, tmp_path: Path
) -> None:
    shutil.copytree(trained(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    assert "no trained weights (adapter/)" in nybble("merge", tmp_path / "run", "--out", tmp_path / "x").err
    done = nybble("merge", tmp_path, "--out", tmp_path / "x")
    assert (done.code, "is not a run directory" in done.err) == (2, True)


def test_the_cache_gives_the_same_base(trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = find_artifact(str(trained()))
    source, asked = find_model(tuned.base), []

    def seen(source: Any, *_: Any) -> Any:
        asked.append(source.name)
        return source

    monkeypatch.setattr(weights_module, "cached_source", seen)
    with BaseWeights(source, tuned.quantization, torch.bfloat16) as base:
        for name, value in decoded(trained()).items():
            assert torch.equal(base.read(name).float(), value), name
    assert asked == [source.name]


def test_the_verifying_scripts_import_nothing_of_ours() -> None:
    for script in ("stock.py", "stock_gguf.py"):
        text = (Path(arithmetic.__file__).with_name(script)).read_text()
        imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert imports
        assert not [line for line in imports if "nybble" in line]
