"""Exports by the command line: files are read back by another reader, and what differs is said."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import models as words
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nybble.bundled import base_path
from nybble.data import encode_prompt
from nybble.errors import ModelError
from nybble.exporting import gguf as module
from nybble.exporting.importance import measure_importance
from nybble.exporting.ollama import modelfile, ollama_template
from nybble.exporting.stock_gguf import undone
from nybble.models.gguf_families import FAMILIES, changed
from nybble.models.gguf_layout import rotary_factors
from tools.families import tiny_config, write_tiny

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models(family)` -> a random model of it, with more query than key heads and a tokenizer of its kind."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(re.sub(r"\W", "_", family))
            write_tokenizer(made[family], family)
            write_tiny(family, made[family], made[family], vocab_size=1024)
            move_from_where_they_start(made[family] / "model.safetensors")
        return made[family]

    return make


def move_from_where_they_start(file: Path) -> None:
    """Norms, biases and gates of a new model are ones and zeros, which tell nothing; and matrices are small."""
    generator = torch.Generator().manual_seed(1)
    weights = load_file(file)
    for name, weight in weights.items():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        elif "embed" not in name:
            weight *= 3
    save_file(weights, file, metadata={"format": "pt"})


def write_tokenizer(folder: Path, family: str) -> None:
    """Sentencepiece's kind with byte tokens for the Llamas, byte-level BPE for the others."""
    if family not in ("llama", "mistral"):
        AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder)
        return
    text = ["Once upon a time there was a little girl. She went to the park. Hello, how are you today? It's 3.14."]
    learner = Tokenizer(words.BPE())
    learner.normalizer = marks()
    learner.train_from_iterator(text * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate([*special, *learned["vocab"]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    model = words.BPE(vocabulary, merges, unk_token=special[0], byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = marks()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def marks() -> Any:
    """Sentencepiece's way to write spaces."""
    return normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


# One of each kind of what is changed; the others with --all.
KINDS = ("llama", "qwen2", "qwen3", "gemma3_text", "falcon", "lfm2", "qwen3_5_text", "granite")
REST = sorted({*FAMILIES, "gemma4_text#shared"} - {*KINDS, "ministral"})


@pytest.mark.parametrize("family", [*KINDS, *(pytest.param(name, marks=pytest.mark.nightly) for name in REST)])
def test_every_known_family_is_read_back_as_the_same_model(
    family: str, nybble: Callable[..., Any], models: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    done = nybble("export", models(family), "--gguf", file, "--json")
    assert done.code == 0, done.err
    assert done.json["mean_kl"] < 1e-5
    assert done.json["max_logit_difference"] < 0.05
    assert done.json["texts_with_other_ids"] == []
    assert done.json["texts"] > 0
    assert done.json["reader"] == ("gguf" if family == "granite" else "transformers") or family not in KINDS


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gemma4_text", {"enable_moe_block": True}, "Gemma 4 with experts"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 6}, "another order than llama.cpp's"),
        ("smollm3", {"no_rope_layers": [1] * 4}, "SmolLM3 with other layers without positions"),
        ("falcon", {"alibi": True}, "Falcon with ALiBi"),
        ("stablelm", {"qk_layernorm": True}, "StableLM with norms"),
        ("ministral", {}, "Ministral with windows"),
        ("mixtral", {}, "does not support the architecture 'mixtral'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "type 'dynamic' in this architecture",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(family: str, changes: dict[str, Any], why: str) -> None:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=re.escape(why)):
        module.check_gguf(SimpleNamespace(config=config))  # type: ignore[arg-type]


def test_a_window_that_llama_cpp_ignores_is_said() -> None:
    assert module.limits_of(SimpleNamespace(config=tiny_config("mistral"))) == []  # type: ignore[arg-type]
    (note,) = module.limits_of(SimpleNamespace(config=tiny_config("mistral#window")))  # type: ignore[arg-type]
    assert "window of 8 tokens" in note


def test_long_rotations_of_phi3_have_both_factors_and_the_scale_of_attention() -> None:
    config = tiny_config("phi3")
    config.max_position_embeddings, config.original_max_position_embeddings = 131072, 4096
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": [2.0] * 8,
        "short_factor": [1.0] * 8,
    }
    settings = FAMILIES["phi3"].settings
    assert settings is not None
    assert settings(config)["rope_scaling_attn_factors"] == pytest.approx((1 + 5 / 12) ** 0.5)  # log2 of 32 and 4096
    factors = rotary_factors(config)
    assert factors["rope_factors_long.weight"].tolist() == [2.0] * 8
    assert factors["rope_factors_short.weight"].tolist() == [1.0] * 8


def test_each_change_is_taken_back() -> None:
    weight = torch.randn(12, 1, 6)
    changes: list[tuple[str, Any]] = [
        ("squeeze", 1),
        ("rows", torch.randperm(12).tolist()),
        ("columns", torch.randperm(6).tolist()),
        ("plus", 1.0),
        ("minus_exp", None),
    ]
    torch.testing.assert_close(undone(changed(weight, changes), changes), weight)
    with pytest.raises(ValueError, match="unknown change turned"):
        undone(weight, [("turned", 1)])


def test_8_bits_take_half_and_differ_a_little(nybble: Callable[..., Any], models: Any, tmp_path: Path) -> None:
    sizes, kl = {}, {}
    for kind in ("bf16", "q8_0"):
        done = nybble("export", models("llama"), "--gguf", tmp_path / kind, "--gguf_type", kind, "--json")
        assert done.code == 0, done.err
        sizes[kind], kl[kind] = done.json["file_bytes"], done.json["mean_kl"]
    assert sizes["q8_0"] < 0.75 * sizes["bf16"]
    assert kl["q8_0"] > 0


@pytest.mark.nightly
def test_a_run_is_quantized_with_an_importance_matrix_of_its_rows(
    nybble: Callable[..., Any], rows_file: Path, tmp_path: Path
) -> None:
    flags = {"model_name_or_path": base_path(), "dataset_name": rows_file, "output_dir": tmp_path / "run", "r": 4}
    flags |= {"max_steps": 2, "device": "cpu", "report_to": "none"}
    assert nybble("train", *(word for name, value in flags.items() for word in (f"--{name}", value))).code == 0
    arguments = ["export", tmp_path / "run", "--gguf", tmp_path / "m.gguf", "--max_new_tokens", 4]
    done = nybble(*arguments, "--quantize", "q4_k_m, Q6_K,Q8_0", "--json")
    assert done.code == 0, done.err
    kl = [one["held_out"]["mean_kl"] for one in done.json["files"]]
    assert kl[0] > max(kl[1:])
    assert min(kl) > 0
    sizes = [one["file_bytes"] for one in done.json["files"]]
    assert sizes == sorted(sizes)
    assert [Path(one["gguf"]).name for one in done.json["files"]] == ["m-Q4_K_M.gguf", "m-Q6_K.gguf", "m-Q8_0.gguf"]
    assert {one["rows"] for one in done.json["files"]} == {"held-out"}


def test_a_whole_model_is_quantized_for_the_rows_that_are_given(
    nybble: Callable[..., Any], rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["export", base_path(), "--dataset_name", rows_file, "--max_new_tokens", 4]
    done = nybble(*arguments, "--gguf", tmp_path / "m.gguf", "--quantize", "q4_k_m", "--json")
    assert done.code == 0, done.err
    (one,) = done.json["files"]
    assert (one["type"], one["rows"], one["gguf"]) == ("Q4_K_M", "given", str(tmp_path / "m.gguf"))
    assert one["held_out"]["mean_kl"] > 0
    assert one["without_importance"]["mean_kl"] not in (0, one["held_out"]["mean_kl"])
    assert "| Q4_K_M |" in Path(done.json["card"]).read_text()
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {one.name: one.tensor_type.name for one in read.tensors}["blk.0.attn_q.weight"] == "Q4_K"
    assert read.fields["general.file_type"].contents() == 15


def test_without_rows_all_columns_count_alike(nybble: Callable[..., Any], models: Any, tmp_path: Path) -> None:
    done = nybble("export", models("llama"), "--gguf", tmp_path / "m.gguf", "--quantize", "Q5_K_S", "--json")
    assert done.code == 0, done.err
    (one,) = done.json["files"]
    assert (one["without_importance"], one["rows"]) == (None, "built-in")
    assert "all columns of a weight count alike" in done.err
    assert "are Q5_1 instead of Q5_K, because their rows are not multiples of 256" in done.err


@pytest.mark.nightly
def test_llama_cpp_computes_the_files_as_stock_transformers_does(
    nybble: Callable[..., Any], rows_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("cyllama", reason="cyllama is not installed")
    arguments = ["export", base_path(), "--dataset_name", rows_file, "--max_new_tokens", 8, "--check", "llama.cpp"]
    done = nybble(*arguments, "--gguf", tmp_path / "m.gguf", "--quantize", "F16,Q4_K_M", "--json")
    assert done.code == 0, (done.err, done.out)
    for one in done.json["files"]:
        assert one["llama_cpp"]["faults"] == []
    exact = done.json["files"][0]["llama_cpp"]
    assert exact["mean_kl"] < 1e-3
    assert exact["greedy_equal"] >= exact["n_prompts"] - 2


def test_without_llama_cpp_the_check_is_refused_before_any_work(
    nybble: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.exporting.destinations.find_spec", lambda name: None)
    done = nybble("export", base_path(), "--gguf", tmp_path / "m.gguf", "--check", "llama.cpp")
    assert (done.code, "nybble[llama_cpp]" in done.err) == (3, True)
    assert done.err.count("\n") == 1


def test_the_first_token_of_a_row_does_not_count_in_the_importance(models: Any) -> None:
    folder, rows = models("llama"), [[1, 5, 6, 7], [1, 9]]
    found = measure_importance(folder, rows, lambda done, of: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, 1:]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    expected = torch.cat(seen).square()
    torch.testing.assert_close(found["model.layers.0.mlp.down_proj.weight"], expected.mean(0))


def test_importance_goes_with_the_columns_as_they_are_written() -> None:
    placed = module._Placed("model.layers.0.x.weight", "blk.0.x.weight", (2, 4), None, [("columns", [3, 2, 1, 0])])
    importance = {"model.language_model.layers.0.x.weight": torch.arange(4.0)}
    found = module._importance_of(placed, importance)
    assert found is not None
    assert found.tolist() == [3, 2, 1, 0]
    assert module._importance_of(placed, {}) is None


def test_rows_in_the_wrong_order_are_found_out(
    nybble: Callable[..., Any], models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "changes_of", lambda *_: [])
    file = tmp_path / "model.gguf"
    done = nybble("export", models("llama"), "--gguf", file, "--json")
    assert done.code == 1
    assert done.json["verified"] is False
    assert "mean KL" in (tmp_path / "model.gguf.UNVERIFIED").read_text()


@pytest.mark.fresh
def test_settings_and_vocabulary_are_in_the_file(nybble: Callable[..., Any], models: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert nybble("export", models("llama"), "--gguf", file).code == 0
    fields = gguf.GGUFReader(file).fields
    seen = {name: fields[name].contents() for name in fields}
    assert seen["general.architecture"] == "llama"
    assert seen["llama.attention.head_count_kv"] == 2
    assert seen["tokenizer.ggml.eos_token_id"] == 2
    assert len(seen["tokenizer.ggml.tokens"]) == 1024
    assert seen["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, two control tokens, the first byte
    assert seen["tokenizer.ggml.token_type"][-1] == 5  # a place that no token takes


def test_llama3_factors_divide_the_frequencies_as_transformers_does() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    factors = rotary_factors(config)["rope_freqs.weight"]
    assert factors is not None
    expected, _scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / torch.from_numpy(factors), expected.float(), rtol=1e-5, atol=0)


def test_the_adapter_alone_has_the_places_and_the_scale(
    nybble: Callable[..., Any], models: Callable[[str], Path], rows_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    flags = {"model_name_or_path": models("llama"), "dataset_name": rows_file, "output_dir": tmp_path / "run", "r": 4}
    flags |= {"lora_alpha": 8, "use_rslora": "true", "max_steps": 2, "device": "cpu", "report_to": "none"}
    assert nybble("train", *(word for name, value in flags.items() for word in (f"--{name}", value))).code == 0
    file = tmp_path / "adapter.gguf"
    assert nybble("export", tmp_path / "run", "--gguf", file, "--gguf_type", "adapter").code == 0
    reader = gguf.GGUFReader(file)
    assert reader.fields["adapter.lora.alpha"].contents() == pytest.approx(8 / 4**0.5 * 4)  # llama.cpp divides by r
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    stored = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0"
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_b"], stored[f"{prefix}.mlp.down_proj.lora_B.weight"])
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_a"], stored[f"{prefix}.self_attn.q_proj.lora_A.weight"])
    halves = stored[f"{prefix}.self_attn.q_proj.lora_B.weight"].view(4, 2, 8, 4)
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], halves.transpose(1, 2).reshape(64, 4))


def test_adapters_of_unequal_rank_and_alpha_have_one_alpha_in_the_file(
    nybble: Callable[..., Any], models: Callable[[str], Path], rows_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    flags = {"model_name_or_path": models("llama"), "dataset_name": rows_file, "output_dir": tmp_path / "run", "r": 4}
    flags |= {"rank_pattern": "{down_proj: 2}", "alpha_pattern": "{up_proj: 6}", "layers_to_transform": 1}
    flags |= {"gradient_checkpointing": "always", "max_steps": 2, "device": "cpu", "report_to": "none"}
    assert nybble("train", *(word for name, value in flags.items() for word in (f"--{name}", value))).code == 0
    file = tmp_path / "adapter.gguf"
    assert nybble("export", tmp_path / "run", "--gguf", file, "--gguf_type", "adapter").code == 0
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert all(name.startswith("blk.1.") for name in tensors)
    stored = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    for part, name, scale in (("ffn_down", "down_proj", 32 / 2), ("ffn_up", "up_proj", 6 / 4)):
        a, b = (stored[f"base_model.model.model.layers.1.mlp.{name}.lora_{which}.weight"] for which in "AB")
        there = tensors[f"blk.1.{part}.weight.lora_b"] @ tensors[f"blk.1.{part}.weight.lora_a"]
        torch.testing.assert_close(there * alpha / len(a), scale * b @ a)
        assert b.any()


def go(template: str, system: str, prompt: str, response: str) -> str:
    """What Ollama makes of one exchange."""
    text = re.sub(r"{{ if .System }}(.*?){{ end }}", r"\1" if system else "", template, flags=re.DOTALL)
    for name, value in (("System", system), ("Prompt", prompt), ("Response", response)):
        text = text.replace(f"{{{{ .{name} }}}}", value)
    return text


def templates() -> dict[str, str]:
    from nybble.data.templates import CHATML, INST

    llama3 = (
        "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + "
        "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
    )
    return {"chatml": CHATML, "inst": INST, "llama3": llama3}


@pytest.mark.parametrize("name", ["chatml", "inst", "llama3"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_ollama_puts_a_chat_as_the_tokenizer_does(name: str, system: str, tiny_llama: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    tokenizer.chat_template = templates()[name]
    template = ollama_template(tokenizer, "template")
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(tokenizer.bos_token)
    answer = " Yes. " if name == "inst" else "Yes."  # there the spaces are for the model to say
    assert go(template, system, "Is it?", answer) == expected


@pytest.mark.parametrize("form", ["inst", "chatml", "llama3", "gemma", "phi3", "alpaca", "plain"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_ollama_puts_a_question_as_the_rows_did(form: str, system: str, tiny_llama: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    asked = go(ollama_template(tokenizer, form).partition("{{ .Response }}")[0], system, "Is it?", "")
    assert tokenizer(asked).input_ids == encode_prompt("Is it?", tokenizer, form, system)


def test_the_modelfile_stops_at_every_end_token(tiny_llama: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    lines = modelfile(tokenizer, "inst", (3,), "model.gguf").splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert [line for line in lines if "stop" in line] == ['PARAMETER stop "<pad>"', 'PARAMETER stop "</s>"']


def test_ollama_folder_is_whole(nybble: Callable[..., Any], models: Any, tmp_path: Path) -> None:
    done = nybble("export", models("llama"), "--ollama", tmp_path / "ollama", "--json")
    assert done.code == 0, done.err
    assert {file.name for file in (tmp_path / "ollama").iterdir()} == {"model.gguf", "Modelfile"}


def test_wrong_input_is_one_line(
    nybble: Callable[..., Any], models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("llama")
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "x.gguf"
    cases = [
        ([tmp_path / "gpt2", "--gguf", file], 2, "'gpt2'; it supports arcee, cohere, "),
        ([model], 2, "--gguf FILE, --ollama DIR or --hub NAME"),
        ([model, "--gguf", file, "--gguf_type", "q2_k"], 2, "allowed: f16, bf16, q8_0, adapter"),
        ([model, "--gguf", file, "--gguf_type", "adapter"], 2, "without an adapter"),
        ([model, "--gguf", file, "--quantize", "Q4_KM"], 2, "did you mean Q4_K_M?"),
        ([model, "--quantize", "Q4_K_M", "--ollama", file], 2, "goes with --gguf FILE"),
        ([tmp_path / "none", "--gguf", file], 2, "does not exist"),
        ([model, "--gguf", tmp_path / "gpt2"], 2, "already exists"),
        ([model, "--hub", "some/name"], 3, "log in with"),
    ]
    for arguments, code, says in cases:
        done = nybble("export", *arguments)
        assert (done.code, says in done.err.splitlines()[-1]) == (code, True), done.err
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = nybble("export", model, "--gguf", file)
    assert (done.code, "nybble[gguf]" in done.err) == (3, True)
    assert not file.exists()
    assert json.loads((tmp_path / "gpt2/config.json").read_text())["model_type"] == "gpt2"
