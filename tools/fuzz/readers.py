"""Every reader of foreign files, as the fuzzer calls it: good files to start from, and one call that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from tools.fuzz.inputs import Change, change_bytes, change_json, change_lines, change_safetensors

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"f": 1}]}]}
SHARED = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": [{"type": "text", "text": "b"}]}]}
TEXTS = [
    {"text": "<s>[INST] <<SYS>>s<</SYS>> a [/INST] b </s>", "answer": "b"},
    {"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c"},
    CHAT,
    SHARED,
    {"tools": '[{"name": "f"}]', **CHAT},
    {"question": "a", "answer": "b", "system": "c", "history": [["d", "e"]], "thinking": "f", "label": True, "x": 1},
    {
        "messages": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": {"name": "f", "arguments": "{}"}},
        ]
    },
    {"functions": [{"name": "f", "parameters": "{}"}], "loss_mask": [0, 1], **CHAT},
    {"conversation": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]'},
    {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
    {"text": "[SYSTEM_PROMPT] s[/SYSTEM_PROMPT][INST] a[/INST] b</s>[INST] c[/INST] d</s>"},
    {"text": "### Human: a### Assistant: b### Human: c### Assistant: d"},
]
EVENT = {"step": 1, "total_steps": 2, "loss": 1.5, "learning_rate": 1e-4, "tokens": 9, "seconds": 1.0, "peak_bytes": 9}
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim }}{% if loop.last %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ADAPTER = (
    b'{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/nowhere", "r": 2, "lora_alpha": 4, '
    b'"target_modules": ["q_proj"], "use_rslora": false, "use_dora": false, "bias": "none", "modules_to_save": null, '
    b'"alpha_pattern": {}, "rank_pattern": {}, "lora_dropout": 0.0, "megatron_core": "megatron.core"}'
)
_FOREIGN = [
    b"base_model: a\nadapter: qlora\ndatasets:\n  - path: rows.jsonl\n    type: alpaca\nval_set_size: 0.1\n"
    b"num_epochs: 2\nevals_per_epoch: 4\nlora_r: 8\nspecial_tokens: {pad_token: x}\nflash_attention: true\n",
    b"model_name_or_path: a\nstage: sft\nfinetuning_type: lora\nlora_target: all\ndataset: a,b\ntemplate: llama3\n",
    b"model_name_or_path: a\ndtype: bfloat16\nuse_peft: true\nlora_target_modules: [q_proj]\neval_steps: 100\n",
]
_CONFIG = json.dumps(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
).encode()


@dataclass(frozen=True)
class Reader:
    """One reader."""

    inputs: int  # of a full run
    seeds: list[bytes]
    change: Change
    read: Callable[[Path], Any]  # of the folder that holds `name`
    name: str
    beside: dict[str, bytes] = field(default_factory=dict)  # further files of the folder
    guided: int = 0  # of a full run, inputs that follow the code's branches
    own_bytes: int = 1 << 20  # allocated whatever the file holds


def readers() -> dict[str, Reader]:
    """All of them."""
    lines = [b"\n".join(json.dumps(row).encode() for row in TEXTS[:2]), *(json.dumps(t).encode() for t in TEXTS)]
    whole = [
        json.dumps(TEXTS[:2] * 2, indent=1).encode(),
        json.dumps([CHAT, CHAT]).encode(),
        json.dumps(SHARED).encode(),
    ]
    events = b"\n".join([json.dumps(EVENT).encode()] * 3)
    adapter, tokens = {"adapter_config.json": _ADAPTER, "adapter_model.safetensors": _factors()}, _tokenizer_files()
    index = b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x.safetensors"}}'
    shards = {"model-00001-of-00002.safetensors": b"", "x.safetensors": b""}
    compared = b'{"verdict": "a", "arms": [{"run_dirs": ["a"]}]}'
    note = (
        b'{"method": "qlora", "quantization": {"encoder": "search"}, "prompt_form": "inst", "stop_tokens": [2], '
        b'"base_fingerprint": "abc"}'
    )
    reported = {"events.jsonl": events, "samples.jsonl": b'{"prompt": "a", "base": "b", "tuned": "c", "expected": ""}'}
    return {
        "recipe": Reader(30_000, _recipes(), change_bytes, _recipe, "recipe.yaml", {}, 60_000, 6 << 20),
        "foreign recipe": Reader(30_000, _FOREIGN, change_bytes, _foreign_recipe, "recipe.yaml", {}, 60_000, 6 << 20),
        "rows, jsonl": Reader(250_000, lines, change_lines, partial(_rows, "r.jsonl"), "r.jsonl", guided=60_000),
        "rows, json": Reader(80_000, whole, change_json, partial(_rows, "r.json"), "r.json", guided=40_000),
        "rows, csv": Reader(120_000, _tables(), change_bytes, partial(_rows, "r.csv"), "r.csv", guided=40_000),
        "rows, txt": Reader(20_000, [b"a\n\nb\n"], change_bytes, partial(_rows, "r.txt"), "r.txt"),
        "rows, parquet": Reader(20_000, [_parquet()], change_bytes, partial(_rows, "r.parquet"), "r.parquet"),
        "rows, arrow": Reader(20_000, [_arrow()], change_bytes, partial(_rows, "r.arrow"), "r.arrow"),
        "chat template": Reader(4_000, [TEMPLATE.encode()], change_bytes, _template, "t.jinja", tokens),
        "safetensors header": Reader(100_000, [_factors()], change_safetensors, _header, "model.safetensors"),
        "safetensors index": Reader(40_000, [index], change_json, _index, "model.safetensors.index.json", shards),
        "4-bit state": Reader(60_000, _states(), change_json, _state, "state.json"),
        "model config": Reader(6_000, [_CONFIG], change_json, _config, "config.json"),
        "tokenizer": Reader(2_000, [tokens["tokenizer.json"]], change_json, _tokenizer, "tokenizer.json", tokens),
        "adapter config": Reader(40_000, [_ADAPTER], change_json, _adapter, "adapter_config.json", adapter),
        "adapter weights": Reader(
            30_000, [_factors()], change_safetensors, _adapter, "adapter_model.safetensors", adapter
        ),
        "adapter note": Reader(20_000, [note], change_json, _tuned, "nybble.json", adapter),
        "run record": Reader(30_000, [_run_record()], change_json, _record, "run.json"),
        "events": Reader(100_000, [events], change_lines, _events, "events.jsonl"),
        "report": Reader(500, [_run_record()], change_json, _report, "run.json", reported, 0, 4 << 20),
        "comparison": Reader(40_000, [compared], change_json, _comparison, "comparison.json"),
        "questions": Reader(40_000, [b'"a"\n{"prompt": "b"}\n'], change_lines, _questions, "q.jsonl"),
    }


def _factors() -> bytes:
    import torch
    from safetensors.torch import save

    module = "base_model.model.model.layers.0.self_attn.q_proj"
    return bytes(save({f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}))


def _tokenizer_files() -> dict[str, bytes]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", *"abcdefghijklmnop", "ab"])}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[("a", "b")], unk_token="<unk>"))  # noqa: S106 - of text
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    settings = b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}'
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": settings, "config.json": _CONFIG}


def _run_record() -> bytes:
    from nybble.recipe import Recipe
    from nybble.run.directory import to_json
    from nybble.run.record import Evaluation, Phase, RunRecord

    judged = Evaluation(loss=1.0, perplexity=2.7, n_rows=2, n_tokens=9, exact_match=0.5, seconds=1.0)
    record = RunRecord(
        status="done",
        recipe=Recipe().model_dump(mode="json"),
        versions={"nybble": "0"},
        device={"name": "cpu", "total_bytes": 9},
        rows={"ledger": {"prompt_form": "inst", "stop_tokens": [2], "rows_read": 9, "tokens_total": 9}, "sha256": "0"},
        plan={},
        model={"packed_bytes": 4, "packed_elements": 8, "fingerprint": "0", "compute_dtype": "float32"},
        started="2026-11-23",
        notes=["a note"],
        phases={"train": Phase(1, 2, 3.0)},
        evaluation_base=judged,
        evaluation_tuned=judged,
        processes={"count": 2, "distributed": "ddp", "peak_bytes": [1, 2]},
    )
    return to_json(record.to_json()).encode()


def _recipes() -> list[bytes]:
    from nybble.recipe import Recipe, save_recipe

    flat = b"method: qlora\nmodel_name_or_path: a\nlr: 2e-4\ntarget_modules: [q_proj, v_proj]\nr: 8 # rank\n"
    whole = save_recipe(Recipe()).encode()
    return [
        whole[:900],
        whole[whole.index(b"evaluation:") :],
        flat,
        b"training: {lr: 1, seed: 3}\n",
        b"paths: >\n  a\n  b\n",
    ]


def _tables() -> list[bytes]:
    return [b'text,answer\n"a, b","c ""d"""\ne,f\n', b"prompt,completion\r\na,b\r\n"]


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([CHAT | {"text": "a" * 50, "n": i} for i in range(20)]), file)
    return bytes(file.getvalue())


def _arrow() -> bytes:
    import pyarrow as pa

    table = pa.Table.from_pylist([{"messages": CHAT["messages"], "name": name} for name in ("a", None, "b")])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def _states() -> list[bytes]:
    plain = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 32]}
    nested = {**plain, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    return [json.dumps(plain).encode(), json.dumps(nested).encode()]


def _foreign_recipe(folder: Path) -> None:
    from nybble.recipe.importing import import_recipe

    import_recipe(folder / "recipe.yaml").to_yaml("recipe.yaml")


def _recipe(folder: Path) -> None:
    from nybble.recipe import load_recipe

    load_recipe(folder / "recipe.yaml")


def _rows(name: str, folder: Path) -> None:
    """All that happens to rows before a tokenizer sees them."""
    from nybble.data.columns import convert_row, find_layout
    from nybble.data.rows import read_rows
    from nybble.data.shapes import answers_of, as_first_unit, exchanges
    from nybble.errors import RowsError
    from nybble.recipe import DataSection

    data = DataSection()
    rows = read_rows(str(folder / name))
    layout = find_layout(rows, data)
    for where, row in rows:
        if isinstance(row, RowsError):
            raise row
        form = convert_row(row, layout, where, has_template=True).form
        answers_of(form)
        for unit in exchanges(form)[1]:
            as_first_unit(unit, form)


def _template(folder: Path) -> None:
    from nybble.data import render_chat
    from nybble.data.templates import find_template

    tokenizer = _loaded(folder)
    tokenizer.chat_template = find_template(str(folder / "t.jinja"))
    render_chat(tokenizer, CHAT["messages"], "row 1")


@cache
def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _header(folder: Path) -> None:
    from nybble.models.folder_checks import read_header, weight_files

    for file in weight_files(folder):
        read_header(file)


def _index(folder: Path) -> None:
    from nybble.models.folder_checks import weight_files

    weight_files(folder)


def _state(folder: Path) -> None:
    import torch

    from nybble.errors import InputError
    from nybble.quant import codebook, dynamic_codebook, from_bnb

    text = (folder / "state.json").read_bytes()
    tensors = {
        "quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(text or b"0"), dtype=torch.uint8),
        "quant_map": codebook("nf4"),
    }
    if b"nested" in text:
        tensors |= {
            "absmax": torch.zeros(2, dtype=torch.uint8),
            "nested_absmax": torch.ones(1),
            "nested_quant_map": dynamic_codebook(),
        }
    else:
        tensors["absmax"] = torch.ones(2)
    try:
        from_bnb(torch.zeros(64, 1, dtype=torch.uint8), tensors)
    except ValueError as error:  # documented there; whoever reads a file of it names the file
        raise InputError(str(error)) from error


def _config(folder: Path) -> None:
    from nybble.models.source import read_config

    read_config(folder, trust_remote_code=False)


def _tokenizer(folder: Path) -> None:
    from nybble.models.tokenizer import find_tokenizer
    from nybble.recipe import ModelSection

    tokenizer, _context = find_tokenizer(ModelSection(model_name_or_path=str(folder)))
    tokenizer.decode(tokenizer("What is one?").input_ids)


def _adapter(folder: Path) -> None:
    from nybble.models import read_adapter

    read_adapter(folder).ranks()


def _tuned(folder: Path) -> None:
    from nybble.models import find_artifact

    find_artifact(str(folder))


def _record(folder: Path) -> None:
    from nybble.models import find_artifact
    from nybble.recipe import stored_recipe
    from nybble.run.directory import read_record

    (folder / "adapter").mkdir(exist_ok=True)
    stored_recipe(read_record(folder), folder)
    find_artifact(str(folder))


def _events(folder: Path) -> None:
    from nybble.reporting.events import loss_points, memory_points, read_events, speed_points

    events, _skipped = read_events(folder)
    for points in (loss_points, memory_points, speed_points):
        points(events)


def _report(folder: Path) -> None:
    from nybble.reporting import write_report

    write_report(folder)


def _comparison(folder: Path) -> None:
    from nybble.reporting.compared import _read

    _read(folder)


def _questions(folder: Path) -> None:
    from nybble.generation import read_questions

    read_questions(folder / "q.jsonl")
