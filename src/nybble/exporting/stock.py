"""A script for a process of its own: what stock transformers makes of a folder. It imports nothing of Nybble.

    python -I stock.py FOLDER QUESTIONS.json REFERENCE.safetensors

QUESTIONS: {"rows": [{"ids", "first", "positions"}], "prompts": [[ids]], "texts": [str], "chats": [messages],
"max_new_tokens", "clock": what tells the template `strftime_now` the date, "max_memory": {device: bytes} or null,
"logit_factor": what the folder's logits are multiplied by before they are compared}.
REFERENCE holds `log_probabilities`, `(positions, vocabulary) float32`, one row after the other. Printed is one JSON
object: mean and worst KL(reference || folder) in nats a position, the loss of both, greedy continuations, and what the
folder's tokenizer makes of texts and chats.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a model that is partly on disk has none of its own


def class_of(folder: str) -> Any:
    """What reads the folder: of a multimodal model its own class, which `AutoModelForCausalLM` may not know."""
    config = AutoConfig.from_pretrained(folder)
    whole = getattr(transformers, (config.architectures or [""])[0], None)
    is_multimodal = config.get_text_config(decoder=True).model_type != config.model_type
    return whole if is_multimodal and whole is not None else AutoModelForCausalLM


def compare_rows(model: Any, rows: list[dict[str, Any]], reference_file: str, logit_factor: float) -> dict[str, Any]:
    """KL and loss over the positions of `rows`."""
    kl_sum = kl_worst = loss_sum = reference_sum = 0.0
    count = 0
    with safe_open(reference_file, framework="pt") as file:
        stored = file.get_slice("log_probabilities")
        for row in rows:
            ids = torch.tensor([row["ids"]], device=_DEVICE)
            at, n = torch.tensor(row["positions"]), len(row["positions"])
            logits = model(input_ids=ids, use_cache=False).logits[0, at.to(_DEVICE) - 1]
            ours = torch.log_softmax(logit_factor * logits.float().cpu(), dim=-1)
            theirs = stored[row["first"] : row["first"] + n]
            kl = (theirs.exp() * (theirs - ours)).sum(dim=-1)
            labels = torch.tensor(row["ids"])[at].unsqueeze(1)
            kl_sum, kl_worst = kl_sum + float(kl.sum()), max(kl_worst, float(kl.max()))
            loss_sum -= float(ours.gather(1, labels).sum())
            reference_sum -= float(theirs.gather(1, labels).sum())
            count += n
    return {
        "mean_kl": kl_sum / count,
        "worst_kl": kl_worst,
        "loss": loss_sum / count,
        "loss_reference": reference_sum / count,
    }


def continue_greedily(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Ids after each prompt, the stop token included, with the folder's own generation config."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=_DEVICE)
        mask = torch.ones_like(ids)
        produced = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        found.append(produced[0, len(prompt) :].tolist())
    return found


def main() -> None:
    """Read, compare, print."""
    answers_file, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    folder, questions_file, reference_file = sys.argv[1:]
    asked = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text_config = AutoConfig.from_pretrained(folder).get_text_config()
    asking = {"add_generation_prompt": True}
    if asked["clock"] and "strftime_now" in (tokenizer.chat_template or ""):
        macro = asked["clock"]["chat_template"].removesuffix("strftime_now")
        asking |= {**asked["clock"], "chat_template": macro + tokenizer.chat_template}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        # What does not fit into memory is read from the folder's own files when its turn comes.
        model = (
            class_of(folder)
            .from_pretrained(
                folder,
                dtype="auto",
                device_map="auto",
                max_memory=asked["max_memory"],
                offload_folder=scratch,
                # Up to transformers 5.17 Gemma 2 may have torch's attention, which leaves the cap on the scores out.
                attn_implementation="eager" if getattr(text_config, "attn_logit_softcapping", None) else None,
            )
            .eval()
        )
        for module in model.modules():
            # bitsandbytes' fast path on some CPUs breaks on other sizes; in training mode the general one is taken.
            if type(module).__name__ == "Linear4bit" and (
                module.out_features % 32 or module.in_features % module.weight.quant_state.blocksize
            ):
                module.train()
        answers: dict[str, Any] = compare_rows(model, asked["rows"], reference_file, asked["logit_factor"])
        answers |= {
            "greedy": continue_greedily(model, asked["prompts"], asked["max_new_tokens"]),
            "texts": [tokenizer(text).input_ids for text in asked["texts"]],
            "chats": [tokenizer.apply_chat_template(c, tokenize=False, **asking) for c in asked["chats"]],
            "stop_tokens": model.generation_config.eos_token_id,
            "foreign": sorted(name for name in sys.modules if name.partition(".")[0] == "nybble"),
        }
    print(json.dumps(answers), file=answers_file, flush=True)


if __name__ == "__main__":
    main()
