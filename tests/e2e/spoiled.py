"""Models, rows, recipes, adapters and runs, each wrong in one way; what `errors.yaml` names."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CHATS = [
    {"messages": [{"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": f"b {i}"}]} for i in range(9)
]
TEMPLATES = {
    "syntax": "{% for x in %}",
    "refusing": "{{ raise_exception('only poems') }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "endless": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "memory": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "recursive": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "escaping": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "long": "x" * 300_000,
    "silent": "{% for m in messages %}{{ m.role ~ eos_token }}{% endfor %}",
    "shut": "{% for m in messages %}{{ '<think></think>' if m.role == 'assistant' }}{{ m.content ~ eos_token }}"
    "{% endfor %}{{ '<think></think>' if add_generation_prompt }}",
    "counting": "{{ messages|length }}{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}",
    "dropping": "{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}{# tool_calls #}",
}
RECIPES = {
    "list": "- a\n- b\n",
    "tabs": "training:\n\tlr: 1\n",
    "object": "run_name: !!python/object/apply:os.system [id]\n",
    "alias": "a: &a [x, x, x]\nb: &b [*a, *a, *a]\n",
    "deep": "a: " + "[" * 5000,
    "twice": "lr: 1e-4\nlearning_rate: 2e-4\n",
    "again": "lora:\n  r: 64\nseed: 1\nlora:\n  lora_dropout: 0.1\n",
    "section": "optimisation:\n  lr: 1e-4\n",
    "token": "run_name: hf_abcdefghijklmnopqrstuvwx\n",
    "password": "dataset_name: https://me:secret@example.org/rows.jsonl\n",
    "digits": "seed: " + "1" * 5000,
    "large": "# " + "x" * 70_000,
}
ROWS = {
    "empty.jsonl": "",
    "broken.jsonl": '{"text": "a"}\n{"text": \n',
    "deep.jsonl": "[" * 100_000,
    "digits.jsonl": '{"text": "a", "n": ' + "1" * 5000 + "}",
    "column.jsonl": '{"text": "a"}\n{"other": "b"}\n',
    "type.jsonl": '{"text": "a"}\n{"text": 3}\n',
    "unknown.jsonl": '{"foo": "a"}\n',
    "numbers.json": "[1, 2]",
    "open.json": '[{"text": "a"}',
    "surrogate.jsonl": '{"text": "\\ud800"}\n',
    "ragged.csv": "text,answer\na,b\na,b,c\n",
    "rows.xlsx": "PK",
    "not.parquet": "PAR1 and no more",
    "long.jsonl": '{"text": "' + "x" * 2_000_001 + '"}\n',
    "chat.jsonl": "".join(json.dumps(chat) + "\n" for chat in CHATS),
    "thought.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
    '"reasoning_content": "c"}]}\n',
    "call.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
    '"tool_calls": [{"function": {"name": "c", "arguments": {}}}]}]}\n',
    "flag.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
    '"weight": 0}]}\n',
    "role.jsonl": '{"messages": [{"role": "judge", "content": "a"}]}\n',
    "silent.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n',
    "order.jsonl": '{"messages": [{"role": "assistant", "content": "a"}, {"role": "system", "content": "a"}]}\n',
    "content.jsonl": '{"messages": [{"role": "user", "content": 3}]}\n',
    "tools.jsonl": '{"tools": "[", "messages": [{"role": "user", "content": "a"}]}\n',
    "questions.jsonl": '"What is one?"\n{"question": "What?"}\n',
    "thesis.txt": "mine",
}


def spoil_all(here: Path, model: Path, rows_file: Path) -> None:
    """Fill `here`: a good model and good rows as well."""
    shutil.copytree(model, here / "model")
    shutil.copy(rows_file, here / "rows.jsonl")
    good = {"model": "model", "dataset_name": "rows.jsonl", "output_dir": "run", "max_steps": 1}
    (here / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in good.items()))
    for name, text in RECIPES.items():
        (here / f"{name}.yaml").write_text(text)
    (here / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    for name, text in ROWS.items():
        (here / name).write_text(text)
    (here / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (here / "splits").mkdir()
    shutil.copy(rows_file, here / "splits" / "train.jsonl")
    for name, text in TEMPLATES.items():
        (here / f"{name}.jinja").write_text(text)
    (here / "used").mkdir()
    (here / "used" / "thesis.txt").write_text("mine")
    (here / "nothing").mkdir()
    _spoil_weights(here)
    _spoil_configs(here)
    _spoil_tokenizers(here)


def _copy(here: Path, name: str) -> Path:
    return Path(shutil.copytree(here / "model", here / name))


def _change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def _spoil_weights(here: Path) -> None:
    weights = "model.safetensors"
    folder = _copy(here, "pickle")
    (folder / weights).rename(folder / "pytorch_model.bin")
    folder = _copy(here, "renamed")
    (folder / weights).rename(folder / "consolidated.safetensors")
    whole = (here / "model" / weights).read_bytes()
    (_copy(here, "cut") / weights).write_bytes(whole[:-1000])
    (_copy(here, "header") / weights).write_bytes(struct.pack("<Q", 1 << 62) + whole[8:])
    overlapping = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    text = json.dumps(overlapping).encode()
    (_copy(here, "overlap") / weights).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    indices = {
        "shard": {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
        "outside": {"weight_map": {"a": "../model/model.safetensors"}},
        "binary": {"weight_map": {"a": "pytorch_model.bin"}},
        "index": {"weight_map": [1]},
    }
    for name, index in indices.items():
        folder = _copy(here, name)
        (folder / weights).unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(here / "model" / weights)
    kept = {k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}
    save_file(kept, _copy(here, "lacking") / weights, metadata={"format": "pt"})
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, _copy(here, "nan") / weights, metadata={"format": "pt"})


def _spoil_configs(here: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "layers": {"num_hidden_layers": 10**9},
        "many": {"num_hidden_layers": 2000},
        "wide": {"hidden_size": 10**12},
        "larger": {"vocab_size": 10**7},
        "heads": {"num_attention_heads": 7, "hidden_size": 64, "head_dim": None},
        "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}},
        "elsewhere": {"transformers_weights": "../model/model.safetensors"},
    }
    for name, change in changes.items():
        _change(_copy(here, name) / "config.json", **change)
    (_copy(here, "beams") / "generation_config.json").write_text('{"num_beams": 1000000}')
    texts = {
        "encoder": '{"model_type": "t5"}',
        "masked": '{"model_type": "bert"}',
        "sighted": '{"model_type": "idefics"}',
        "seeing": '{"model_type": "vit"}',
        "captioner": '{"model_type": "florence2"}',
        "nojson": "{",
        "nested": '{"a": ' * 200 + "1" + "}" * 200,
        "array": "[]",
    }
    for name, text in texts.items():
        (_copy(here, name) / "config.json").write_text(text)
    (_copy(here, "pictures") / "model_index.json").write_text("{}")


def _spoil_tokenizers(here: Path) -> None:
    (_copy(here, "notokenizer") / "tokenizer.json").write_text('{"version": "1.0"}')
    (_copy(here, "deeptokenizer") / "tokenizer.json").write_text("[" * 100_000)
    _change(_copy(here, "endless") / "tokenizer_config.json", eos_token=None)
    _change(
        _copy(here, "codetokenizer") / "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["mine.Mine", None]},
    )
    model = json.loads((here / "model" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _change(_copy(here, "unknowing") / "tokenizer.json", pre_tokenizer=None, model={**model, "unk_token": "<gone>"})
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    _change(_copy(here, "growing") / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 64})
    folder = _copy(here, "foreign")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    extra = {**content["added_tokens"][-1], "id": 10**6, "content": "<new>"}
    _change(folder / "tokenizer.json", added_tokens=[*content["added_tokens"], extra])


def spoil_runs(here: Path, nybble: Callable[[list[str]], int]) -> None:
    """One finished run, a 4-bit model, and what is wrong about others; `here` is the working directory."""
    assert nybble(["train", "recipe.yaml", "--output_dir", "done"]) == 0
    assert nybble(["quantize", "model", "--out", "packed"]) == 0
    file = Path(shutil.copytree(here / "packed", here / "state")) / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "quant_state" in key)
    tensors[name] = torch.tensor(list(b'{"quant_type": {"a": {"b": 1}}}'), dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    changes: dict[str, Any] = {
        "rank": {"r": 10**9},
        "alpha": {"lora_alpha": "much"},
        "megatron": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        "pattern": {"alpha_pattern": {"(a+)+$": 2}},
        "ia3": {"peft_type": "IA3"},
        "nobase": {"base_model_name_or_path": None},
        "pickled": {},
        "linked": {},
        "half": {},
        "noted": {},
        "larger-adapter": {},
    }
    for name, change in changes.items():
        folder = Path(shutil.copytree(here / "done" / "adapter", here / name))
        _change(folder / "adapter_config.json", **change)
    (here / "pickled" / "adapter_model.safetensors").rename(here / "pickled" / "adapter_model.bin")
    (here / "linked" / "notes.txt").symlink_to("/etc/hostname")
    (here / "noted" / "nybble.json").write_text('{"stop_tokens": ["</s>"]}')
    (here / "half" / "adapter_config.json").write_text('{"peft_type": ')
    file = here / "larger-adapter" / "adapter_model.safetensors"
    save_file({k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in load_file(file).items()}, file)
    _spoil_records(here)


def _spoil_records(here: Path) -> None:
    record = json.loads((here / "done" / "run.json").read_text(encoding="utf-8"))
    trusting = json.loads(json.dumps(record))
    trusting["recipe"]["model"]["trust_remote_code"] = True
    broken: dict[str, Any] = {
        "damaged": "{",
        "partial": json.dumps({"status": "done"}),
        "ledgerless": json.dumps(record | {"rows": {}}),
        "phaseless": json.dumps(record | {"phases": {"train": 3}}),
        "future": json.dumps(record | {"recipe": {"method": "quantum"}}),
        "lines": json.dumps(record | {"recipe": {"lora\nof two lines": 1}}),
        "trusting": json.dumps(trusting),
    }
    for name, text in broken.items():
        (here / name).mkdir()
        (here / name / "run.json").write_text(text)
        (here / name / "recipe.yaml").write_text("trust_remote_code: true\n" if name == "trusting" else "")
        (here / name / "adapter").mkdir()
    (here / "weightless").mkdir()
    (here / "weightless" / "run.json").write_text(json.dumps(record))
    for name, arms in {"comparison": 3, "peeking": [{"run_dirs": ["../done"]}]}.items():
        (here / name).mkdir()
        (here / name / "comparison.json").write_text(json.dumps({"verdict": "", "arms": arms}))
