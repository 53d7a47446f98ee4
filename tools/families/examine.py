"""What Nybble makes of one family, and what transformers, PEFT and bitsandbytes make of it, on a tiny random model.

What is found is one flat JSON object. Each part of it is "ok", "refused" (an error of the documented kind), "FAULT"
(any other), "differs" (done, and the numbers are not equal), or None where a part before it failed; `errors` says why.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import nybble
from nybble.errors import NybbleError
from nybble.hardware import detect_device
from nybble.models import find_artifact
from nybble.models.artifact import load_artifact
from nybble.models.blocks import blocks_of
from nybble.models.skeleton import embeddings_and_head
from nybble.nn import Linear4bit
from tools.families.tiny import MULTIMODAL, model_class, tiny_config, write_tiny

METHODS = ("qlora", "lora", "full")
# The share of what an adapter adds to the logits that two ways of adding it may differ by; and rounding of float32.
_SHARE = 0.02
_ROUNDING = 1e-4


@dataclass
class Examination:
    """A family under examination: where its files lie, and what was found."""

    family: str
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The checkpoint."""
        return self.folder / "base"

    def run(self, method: str) -> Path:
        """The run that trained it by `method`."""
        return self.folder / method

    def part(self, name: str, does: Callable[[Examination], Any], needs: tuple[str, ...] = ()) -> None:
        """Do a part and note how it ended; nothing is done where a part that it needs did not end well."""
        if any(self.found.get(one) != "ok" for one in needs):
            self.found[name] = None
            return
        started = time.monotonic()
        try:
            self.found[name] = does(self) or "ok"
        except NybbleError as error:
            self.found[name] = "refused" if error.exit_code != 1 else "FAULT"
            self.found["errors"][name] = self._without_folder(str(error))[:300]
        except Exception as error:  # noqa: BLE001 - every fault is a finding
            self.found[name] = "FAULT"
            said = f"{type(error).__name__}: {error} ({_place(error)})"
            self.found["errors"][name] = self._without_folder(said)[:300]
        self.found["seconds"][name] = round(time.monotonic() - started, 1)

    def _without_folder(self, text: str) -> str:
        """A result names files relative to the folder of its family, which is gone afterwards."""
        return text.replace(f"{self.folder}/", "")


def examine(
    family: str,
    tokenizer_dir: Path,
    note: Callable[[dict[str, Any]], None] | None = None,
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Examine one family, or `only` some parts, or all `without` some; `note` gets what was found after each part."""
    with tempfile.TemporaryDirectory(prefix="nybble-family-") as folder:
        of = Examination(family, Path(folder), {"family": family, "errors": {}, "seconds": {}})
        _write_rows(of.folder / "rows.jsonl")
        parts: list[tuple[str, Callable[[Examination], Any], tuple[str, ...]]] = [
            ("build", lambda of: write_tiny(family, of.base, tokenizer_dir) and None, ()),
            ("stock", _stock_trains, ("build",)),
            *((method, lambda of, method=method: _train(of, method), ("build",)) for method in METHODS),
            ("structure", _structure, ("qlora",)),
            ("peft", _stock_peft, ("lora",)),
            ("merge", _merge, ("qlora",)),
            ("gguf", _gguf, ("merge",)),
            ("ask", lambda of: nybble.ask(of.run("qlora"), ["What is 3?"], max_new_tokens=4) and None, ("qlora",)),
            ("plan", _plan, ()),
        ]
        for name, does, needs in parts:
            if (only and name not in only) or name in without:
                continue
            of.part(name, does, needs)
            if note is not None:
                note(of.found)
        return of.found


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"


def _write_rows(file: Path) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(24)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _recipe(of: Examination, method: str) -> dict[str, Any]:
    return {
        "model_name_or_path": str(of.base),
        "dataset_name": str(of.folder / "rows.jsonl"),
        "output_dir": str(of.run(method)),
        "method": method,
        "device": "cpu",
        "bnb_4bit_compute_dtype": "float32",
        "r": 4,
        "learning_rate": 1e-2 if method != "full" else 1e-4,
        "max_steps": 3,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_eval_rows": 2,
        "n_samples": 1,
        "save_strategy": "no",
    }


def _plan(of: Examination) -> None:
    """A plan for the family's default config, which is that of a real checkpoint; no weights are read."""
    folder = of.folder / "true shape"
    config = CONFIG_MAPPING[of.family.removeprefix(MULTIMODAL).split("#")[0]]()
    config.architectures = [model_class(of.family).__name__]
    config.save_pretrained(folder)
    nybble.plan({**_recipe(of, "qlora"), "model_name_or_path": str(folder), "bnb_4bit_compute_dtype": "bfloat16"})


def _train(of: Examination, method: str) -> None:
    record = nybble.train(_recipe(of, method))
    if method == "qlora":
        of.found["notes"] = record.notes
        of.found["left_in_16bit"] = record.model["left_in_16bit"]


def _loaded(run: Path) -> Any:
    """The model of a run as Nybble loads it, ready to answer."""
    return load_artifact(find_artifact(str(run)), detect_device("cpu"))[0].eval()


def _structure(of: Examination) -> None:
    """How much is packed, which blocks are ours, and what was done to the router."""
    model = _loaded(of.run("qlora"))
    report = blocks_of(model)
    base = model.get_base_model()
    ends = embeddings_and_head(base)
    routers = [name for name in _adapted_or_packed(base) if _chooses_experts(base, name)]
    packed = sum(_packed_elements(module) for module in base.modules())
    left = sum(
        p.numel()
        for name, p in base.named_parameters()
        if p.ndim > 1
        and p.is_floating_point()
        and "lora_" not in name
        and not name.startswith(tuple(filter(None, ends)))
    )
    of.found["packed_share"] = round(packed / (packed + left), 4)
    of.found["flattened"] = report.flattened
    of.found["blocks"] = report.blocks
    of.found["reason"] = report.reason
    of.found["router"] = routers


def _packed_elements(module: nn.Module) -> int:
    if isinstance(module, Linear4bit):
        return int(module.out_features * module.in_features)
    return int(getattr(module, "n_elements", 0)) if type(module).__name__ == "Experts4bit" else 0


def _adapted_or_packed(base: nn.Module) -> list[str]:
    return [
        name for name, module in base.named_modules() if isinstance(module, Linear4bit) or hasattr(module, "lora_A")
    ]


def _chooses_experts(base: Any, name: str) -> bool:
    """Whether a linear has an output per expert: nothing else in a tiny model is 4 or 5 wide."""
    module = base.get_submodule(name)
    return getattr(module, "out_features", 0) in (4, 5) and any(word in name for word in ("gate", "router", "expert"))


def _ids(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, min(vocabulary, 256), (1, 24), generator=generator)


def _stock(of: Examination, folder: Path, **more: Any) -> Any:
    """The checkpoint in `folder` as transformers loads it, without anything of Nybble."""
    owner = model_class(of.family) if of.family.startswith(MULTIMODAL) else AutoModelForCausalLM
    return owner.from_pretrained(folder, dtype=torch.float32, **more)


def _arguments(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a row of text alone is given as: some multimodal classes ask for the kind of each token.

    Others, such as GPT-2's, would add an embedding of the kind.
    """
    asked = inspect.signature(model.forward).parameters if model.config.get_text_config() is not model.config else ()
    kinds = [name for name in ("token_type_ids", "mm_token_type_ids") if name in asked]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **{name: torch.zeros_like(ids) for name in kinds}}


@torch.no_grad()
def _logits(model: Any, ids: Tensor, *, stock: bool = False) -> Tensor:
    given = _arguments(model, ids) if stock else {"input_ids": ids}
    logits: Tensor = model(**given, use_cache=False).logits
    return logits.float()


def _equal(of: Examination, name: str, theirs: Tensor, ours: Tensor, effect: float) -> str:
    difference = float((theirs - ours).abs().max())
    of.found[f"{name}_difference"] = difference
    of.found[f"{name}_effect"] = effect
    if difference <= _SHARE * effect + _ROUNDING:
        return "ok"
    of.found["errors"][name] = f"logits differ by {difference:.2e}; the adapter changes them by {effect:.2e}"
    return "differs"


def _stock_peft(of: Examination) -> str:
    """The adapter of the run that trained on a 16-bit base, in PEFT alone."""
    from peft import PeftModel

    ids = _ids(tiny_config(of.family).get_text_config().vocab_size)
    ours = _logits(_loaded(of.run("lora")), ids)
    model = _stock(of, of.base).eval()
    before = _logits(model, ids, stock=True)
    adapted = PeftModel.from_pretrained(model, str(of.run("lora") / "adapter")).eval()
    theirs = _logits(adapted.get_base_model(), ids, stock=True)
    return _equal(of, "peft", theirs, ours, float((theirs - before).abs().max()))


def _merge(of: Examination) -> str:
    """The merged folder in transformers alone: the logits of the adapter on its own base."""
    out = of.folder / "merged"
    result = nybble.merge(of.run("qlora"), out, into="dequantized", dtype="float32")
    if not result["verified"]:
        of.found["errors"]["merge"] = "; ".join(result["faults"])
        return "differs"
    ids = _ids(tiny_config(of.family).get_text_config().vocab_size)
    model = _loaded(of.run("qlora"))
    ours = _logits(model, ids)
    with model.disable_adapter():
        effect = float((ours - _logits(model, ids)).abs().max())
    return _equal(of, "merge", _logits(_stock(of, out).eval(), ids, stock=True), ours, effect)


def _gguf(of: Examination) -> str:
    result = nybble.export(of.folder / "merged", gguf=of.folder / "model.gguf")
    if not result["verified"]:
        of.found["errors"]["gguf"] = "; ".join(result["faults"])
    return "ok" if result["verified"] else "differs"


def _stock_trains(of: Examination) -> None:
    """One backward pass of transformers + PEFT on bitsandbytes' 4 bits (or 16 bits without it)."""
    from importlib.util import find_spec

    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    has_bitsandbytes = find_spec("bitsandbytes") is not None
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if has_bitsandbytes else None
    model = _stock(of, of.base, quantization_config=config)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")).train()
    ids = _ids(tiny_config(of.family).get_text_config().vocab_size)
    loss = adapted(**_arguments(model, ids), labels=ids).loss
    loss.backward()
    trained = [p.grad for p in adapted.parameters() if p.requires_grad and p.grad is not None]
    if not loss.isfinite() or not trained:
        raise ValueError(f"loss {float(loss)}, {len(trained)} gradients")
