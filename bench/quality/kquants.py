"""K-quants on a real model: size, KL and loss of GGUF files with and without importance matrix, beside llama.cpp's own.

A model in 16 bits is written as each type. Every file is decoded by the `gguf` package and run by stock transformers in
float32; KL(16 bits || file) and loss are those of all positions of the held-out rows, in nats. llama.cpp's quantizer is
that of the package cyllama (`pip install 'nybble[llama_cpp]'`), without an importance matrix, which it does not take.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.harness import Option, run
from nybble.exporting.gguf import write_gguf
from nybble.exporting.importance import measure_importance
from nybble.exporting.mixes import MIXES
from nybble.exporting.stock_gguf import tensors_of
from nybble.models import find_model
from nybble.recipe import ModelSection

LLAMA_CPP = "llama.cpp without importance matrix"
_QUANTIZE = """
import sys
from cyllama.llama import llama_cpp
params = llama_cpp.LlamaModelQuantizeParams()
params.ftype, params.nthread = int(sys.argv[3]), 1
llama_cpp.model_quantize(sys.argv[1], sys.argv[2], params)
"""


def measure(asked: Namespace) -> dict[str, Any]:
    """By type: bytes of the file, mean and worst KL, loss."""
    import gguf

    torch.set_num_threads(1)
    folder = Path(asked.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = find_model(ModelSection(model_name_or_path=str(folder)))
    rows = [_ids(tokenizer, row) for row in json.loads(Path(asked.rows).read_text(encoding="utf-8"))]
    held_out = rows[-asked.held_out :]
    importance = measure_importance(folder, rows[: asked.calibration_rows], lambda done, of: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [_log_probabilities(model, row) for row in held_out]
    results: dict[str, Any] = {"loss_16bit": _loss(expected, held_out), "files": []}
    results["positions"] = sum(len(row) - 1 for row in held_out)
    with tempfile.TemporaryDirectory() as scratch:
        file, exact = Path(scratch) / "model.gguf", Path(scratch) / "f16.gguf"

        def write(kind: str, place: Path, matrix: Any) -> list[dict[str, Any]]:
            outtype = kind if kind in MIXES else kind.lower()
            stops = (tokenizer.eos_token_id,)
            return write_gguf(source, tokenizer, stops, place, outtype, lambda done, of: None, matrix)

        def add(kind: str, how: str, tensors: list[dict[str, Any]]) -> None:
            model.load_state_dict(dict(tensors_of(str(folder), str(file), tensors)), strict=False)
            got = [_log_probabilities(model, row) for row in held_out]
            kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(expected, got, strict=True)])
            figures = {"mean_kl": float(kl.mean()), "worst_kl": float(kl.max()), "loss": _loss(got, held_out)}
            results["files"].append({"type": kind, "how": how, "bytes": file.stat().st_size, **figures})
            print(results["files"][-1], file=sys.stderr, flush=True)
            file.unlink()

        write("F16", exact, None)
        for kind in asked.types:
            add(kind, "with importance matrix", write(kind, file, importance))
            if kind in MIXES:
                tensors = write(kind, file, None)
                add(kind, "without importance matrix", tensors)
                number = gguf.LlamaFileType[f"MOSTLY_{kind}"].value
                command = [sys.executable, "-c", _QUANTIZE, str(exact), str(file), str(number)]
                if not subprocess.run(command, capture_output=True, check=False).returncode:
                    add(kind, LLAMA_CPP, tensors)
    return results


def _ids(tokenizer: Any, row: dict[str, str]) -> list[int]:
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    ids: list[int] = tokenizer.apply_chat_template(turns, return_dict=False)
    return ids


@torch.no_grad()
def _log_probabilities(model: Any, row: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _loss(log_probabilities: list[torch.Tensor], rows: list[list[int]]) -> float:
    lost = [-p.gather(1, torch.tensor(row[1:])[:, None]) for p, row in zip(log_probabilities, rows, strict=True)]
    return float(torch.cat(lost).mean())


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("model", "", None, "folder of a model in 16 bits"),
        Option("rows", "", None, "a .json file of rows with instruction, input and output"),
        Option("types", ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S"), ("Q4_K_M",), "types to write"),
        Option("calibration_rows", 64, 4, "rows that the importance matrix is measured on, the first ones"),
        Option("held_out", 16, 2, "rows that are compared, the last ones"),
    )
