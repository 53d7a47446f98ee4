"""A script for a process of its own: whether a GGUF file is the model in a folder. It imports nothing of Nybble.

    python -I stock_gguf.py FOLDER FILE.gguf TEXTS.json TENSORS.json

Both are run by stock transformers and compared on TEXTS (a list of strings): token ids, logits, KL(folder || file) in
nats a position, special tokens and chat template. The file is read by transformers' GGUF loader where that knows the
architecture: with the settings that the loader takes from the file, the others from the folder. Otherwise every tensor
is read by the `gguf` package, what TENSORS says was changed in it is undone, and the folder's config is used.
TENSORS: [{"name": in the checkpoint, "place": in the file, "changes": [[kind, value]]}]. One JSON object is printed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

# Settings that the loader reads from a file as a config has them.
READ_FROM_THE_FILE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    "conv_L_cache",
    "vocab_size",
    "tie_word_embeddings",
)
# What the loader says to an architecture that it does not know, and to a setting that is a list in the file.
UNREADABLE = (ValueError, KeyError, StrictDataclassError)
_SMALL = 1_000_000_000  # parameters up to which both are compared in float32


def logits_of(model: Any, ids_of_texts: list[list[int]]) -> list[Any]:
    """Of each text, `(tokens, vocabulary) float32`."""
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().cpu() for ids in ids_of_texts]


def compare_logits(of_folder: list[Any], of_file: list[Any]) -> dict[str, float]:
    """Largest difference of logits, mean and worst KL."""
    worst_logit = worst_kl = kl_sum = 0.0
    count = 0
    for x, y in zip(of_folder, of_file, strict=True):
        worst_logit = max(worst_logit, float((x - y).abs().max()))
        p, q = torch.log_softmax(x, dim=-1), torch.log_softmax(y, dim=-1)
        kl = (p.exp() * (p - q)).sum(dim=-1)
        worst_kl = max(worst_kl, float(kl.max()))
        kl_sum += float(kl.sum())
        count += len(x)
    return {"max_logit_difference": worst_logit, "mean_kl": kl_sum / count, "worst_kl": worst_kl}


def undone(weight: Any, changes: list[Any]) -> Any:
    """The tensor as a checkpoint has it: each change is taken back, the last one first."""
    for kind, value in reversed(changes):
        if kind in ("rows", "columns"):
            back = torch.argsort(torch.tensor(value))
            weight = weight[back] if kind == "rows" else weight[:, back]
        elif kind == "plus":
            weight = weight - value
        elif kind == "squeeze":
            weight = weight.unsqueeze(value)
        elif kind == "minus_exp":
            weight = torch.log(-weight)
        else:
            raise ValueError(f"unknown change {kind}")
    return weight


def tensors_of(folder: str, file: str, tensors: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors of the file by their names in the checkpoint, one at a time; a tower's come from the checkpoint."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for one in tensors:
        if one["place"] is not None:
            tensor = stored[one["place"]]
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            yield one["name"], undone(weight, one["changes"]).contiguous()
    towers = {one["name"] for one in tensors if one["place"] is None}
    for shard in Path(folder).glob("*.safetensors"):
        with safe_open(shard, framework="pt") as held:
            for name in towers.intersection(held.keys()):
                yield name, held.get_tensor(name)


def write_decoded(folder: str, file: str, tensors: list[dict[str, Any]], out: Path, dtype: Any) -> None:
    """Write the folder's model with every tensor of its language model from the file, each to a file of its own."""
    for small in Path(folder).iterdir():
        if small.is_file() and not small.name.endswith((".safetensors", ".index.json")):
            shutil.copy(small, out)
    places = {}
    for number, (name, weight) in enumerate(tensors_of(folder, file, tensors)):
        places[name] = f"tensor-{number}.safetensors"
        save_file({name: weight.to(dtype)}, out / places[name], metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def model_of_tensors(folder: str, file: str, tensors: list[dict[str, Any]], dtype: Any) -> Any:
    """The folder's model with every tensor of its language model from the file."""
    with tempfile.TemporaryDirectory() as scratch:
        write_decoded(folder, file, tensors, Path(scratch), dtype)
        model, info = class_of(folder).from_pretrained(scratch, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the file lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.eval()


def class_of(folder: str) -> Any:
    """The class of the checkpoint: a multimodal one has its own."""
    config = AutoConfig.from_pretrained(folder)
    is_whole = config.get_text_config() is config
    return AutoModelForCausalLM if is_whole else getattr(transformers, config.architectures[0])


def model_of_loader(where: dict[str, Any], own_config: Any, dtype: Any) -> Any | None:
    """The file as transformers' GGUF loader reads it; None where that does not know the architecture."""
    try:
        read = AutoConfig.from_pretrained(**where)
    except UNREADABLE:
        return None
    is_same = own_config.model_type == read.model_type
    taken, given = (own_config, read) if is_same else (read, own_config)
    for name in READ_FROM_THE_FILE if is_same else ("rope_parameters", "head_dim"):
        if name in vars(taken) and vars(given).get(name) is not None:
            setattr(taken, name, vars(given)[name])
    return AutoModelForCausalLM.from_pretrained(**where, config=taken, dtype=dtype).eval()


def read_tokenizer(where: dict[str, Any]) -> Any:
    """The file's tokenizer; of an architecture whose config transformers cannot read, of the fields alone."""
    try:
        return AutoTokenizer.from_pretrained(**where)
    except UNREADABLE:
        return PreTrainedTokenizerFast.from_pretrained(**where)


def main() -> None:
    """Read both, compare, print."""
    answers_file, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    folder, file, texts_file, tensors_file = sys.argv[1:]
    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = read_tokenizer(where)
    ids = [tokenizer(text).input_ids for text in texts]
    special = [(one.bos_token_id, one.eos_token_id) for one in (tokenizer, read)]
    answers: dict[str, Any] = {
        "texts": len(texts),
        "texts_with_other_ids": [text for text, own in zip(texts, ids, strict=True) if read(text).input_ids != own],
        "same_special_tokens": special[0] == special[1],
        "same_chat_template": (tokenizer.chat_template or None) == (read.chat_template or None),
        "foreign": sorted(name for name in sys.modules if name.partition(".")[0] == "nybble"),
    }
    with torch.no_grad():
        own = class_of(folder).from_pretrained(folder, dtype="auto").eval()
        dtype = torch.float32 if sum(p.numel() for p in own.parameters()) <= _SMALL else torch.bfloat16
        asked = [one for one in ids if one]
        expected = logits_of(own.to(dtype), asked)
        del own  # one model at a time
        own_config = AutoConfig.from_pretrained(folder)
        loaded = model_of_loader(where, own_config, dtype) if own_config.get_text_config() is own_config else None
        answers["reader"] = "gguf" if loaded is None else "transformers"
        if loaded is None:
            tensors = json.loads(Path(tensors_file).read_text(encoding="utf-8"))
            loaded = model_of_tensors(folder, file, tensors, dtype)
        answers |= compare_logits(expected, logits_of(loaded, asked))
    print(json.dumps(answers), file=answers_file, flush=True)


if __name__ == "__main__":
    main()
