"""A script for a process of its own: whether a GGUF file is the model in a folder. It imports nothing of Nybble.

    python -I stock_gguf.py FOLDER FILE.gguf TEXTS.json

Both are read by stock transformers, the file by its GGUF loader, and compared on TEXTS (a list of strings): token ids,
logits, KL(folder || file) in nats a position, special tokens and chat template. One JSON object is printed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_SMALL = 1_000_000_000  # parameters up to which both are compared in float32


def compare_logits(folder: Any, file: Any, ids_of_texts: list[list[int]]) -> dict[str, float]:
    """Largest difference of logits, mean and worst KL."""
    worst_logit = worst_kl = kl_sum = 0.0
    count = 0
    for ids in ids_of_texts:
        x, y = (model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for model in (folder, file))
        worst_logit = max(worst_logit, float((x - y).abs().max()))
        p, q = torch.log_softmax(x, dim=-1), torch.log_softmax(y, dim=-1)
        kl = (p.exp() * (p - q)).sum(dim=-1)
        worst_kl = max(worst_kl, float(kl.max()))
        kl_sum += float(kl.sum())
        count += len(ids)
    return {"max_logit_difference": worst_logit, "mean_kl": kl_sum / count, "worst_kl": worst_kl}


def main() -> None:
    """Read both, compare, print."""
    answers_file, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    folder, file, texts_file = sys.argv[1:]
    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = AutoTokenizer.from_pretrained(**where)
    ids = [tokenizer(text).input_ids for text in texts]
    special = [(one.bos_token_id, one.eos_token_id) for one in (tokenizer, read)]
    answers: dict[str, Any] = {
        "texts": len(texts),
        "texts_with_other_ids": [text for text, own in zip(texts, ids, strict=True) if read(text).input_ids != own],
        "same_special_tokens": special[0] == special[1],
        "same_chat_template": (tokenizer.chat_template or None) == (read.chat_template or None),
        "foreign": sorted(name for name in sys.modules if name.partition(".")[0] == "nybble"),
    }
    config, own_config = AutoConfig.from_pretrained(**where), AutoConfig.from_pretrained(folder)
    if own_config.rope_parameters.get("rope_type", "default") != "default":
        config.rope_parameters = own_config.rope_parameters  # transformers' loader does not read scaled rotations
    config.head_dim = getattr(own_config, "head_dim", None)  # nor heads that are not hidden size / number of heads
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        dtype = torch.float32 if sum(p.numel() for p in own.parameters()) <= _SMALL else torch.bfloat16
        loaded = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=dtype).eval()
        answers |= compare_logits(own.to(dtype), loaded, [one for one in ids if one])
    print(json.dumps(answers), file=answers_file, flush=True)


if __name__ == "__main__":
    main()
