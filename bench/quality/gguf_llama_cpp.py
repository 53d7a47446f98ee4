"""GGUF files of every family that Nybble writes, computed by llama.cpp: KL(transformers || llama.cpp) in nats.

A tiny random model of each family, whose vectors are moved away from ones and zeros, is written in float16. llama.cpp,
of the package xllamacpp (`pip install xllamacpp`, not needed otherwise), computes the next token after 1, 7, 13 and 40
tokens, longer than the windows; so does transformers in float32. Token ids of a few texts are compared as well.
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.harness import Option, run
from nybble.bundled import base_path
from nybble.errors import NybbleError
from nybble.exporting.gguf import write_gguf
from nybble.exporting.verify import TEXTS
from nybble.models import find_model
from nybble.models.gguf_families import FAMILIES
from nybble.recipe import ModelSection
from tools.families import write_tiny

LENGTHS = (1, 7, 13, 40)
# In a process of its own: llama.cpp ends the process at what it does not expect.
_LLAMA_CPP = """
import json, os, sys, urllib.request
import xllamacpp
file, asked = sys.argv[1], json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_batch, params.n_parallel, params.warmup = file, 256, 256, 1, False
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
def post(where, content):
    request = urllib.request.Request(
        server.listening_address + where, json.dumps(content).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())
letter = post("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
rows = []
for ids in asked["rows"]:
    # The token is forced to be one that is text of its own, as others are held back; the figures are from before that.
    found = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 1000000, "temperature": 0.0,
        "cache_prompt": False, "post_sampling_probs": False, "ignore_eos": True, "logit_bias": [[letter, 1000.0]]})
    top = found["completion_probabilities"][0]["top_logprobs"]
    rows.append([one["logprob"] for one in sorted(top, key=lambda one: one["id"])])
texts = [post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    for text in asked["texts"]]
print(json.dumps({"rows": rows, "texts": texts}), flush=True)
os._exit(0)
"""


def measure(asked: Namespace) -> dict[str, Any]:
    """Each family: KL by the number of tokens, largest difference of log-probabilities, texts with the same ids."""
    torch.set_num_threads(1)
    named = [name for name in asked.families if name] or [*sorted(set(FAMILIES) - {"ministral"}), "gemma4_text#shared"]
    found = {}
    for family in named:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found[family] = _family(family, Path(scratch))
            except NybbleError as error:
                found[family] = {"refused": str(error)}
        print(family, found[family], file=sys.stderr, flush=True)
    return found


def _family(family: str, scratch: Path) -> dict[str, Any]:
    folder = write_tiny(family, scratch / "model", base_path())
    _move(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = find_model(ModelSection(model_name_or_path=str(folder)))
    file = scratch / "model.gguf"
    write_gguf(source, tokenizer, (tokenizer.eos_token_id,), file, "f16", lambda _done, _of: None)
    ids = torch.randint(5, 200, (max(LENGTHS),), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [ids[:length] for length in LENGTHS]
    done = subprocess.run(
        [sys.executable, "-c", _LLAMA_CPP, str(file)],
        input=json.dumps({"rows": rows, "texts": TEXTS}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"llama_cpp": f"ended with {done.returncode}: {done.stderr[-300:]}"}
    theirs = json.loads(done.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    kl, worst = [], 0.0
    for row, logprobs in zip(rows, theirs["rows"], strict=True):
        with torch.no_grad():
            ours = torch.log_softmax(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].double(), -1)
        other = torch.tensor(logprobs, dtype=torch.float64)[: len(ours)]
        kl.append(float((ours.exp() * (ours - other)).sum()))
        worst = max(worst, float((ours - other).abs().max()))
    same = sum(ids == tokenizer(text).input_ids for ids, text in zip(theirs["texts"], TEXTS, strict=True))
    return {"kl": kl, "max_difference": worst, "std_of_logprobs": float(ours.std()), "same_texts": same}


def _move(file: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = load_file(file)
    for name, weight in weights.items():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        elif "embed" not in name:
            weight *= 3
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    run(measure, __doc__, Option("families", ("",), ("llama",), "families; default: all that are written"))
