"""A whole recipe of TRL, Axolotl or LLaMA-Factory as one of ours.

Most names are understood as they are (`nybble.recipe.catalogue`). What is said in another way is converted here, a
default of the tool that differs from ours is written out, and a remark is kept for each setting that means something
else or nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nybble.errors import RecipeError
from nybble.guard import clipped, shown
from nybble.recipe.catalogue import spellings
from nybble.recipe.importing_preferences import preferences_of
from nybble.recipe.load import first_fault, read_yaml
from nybble.recipe.other_tools import ANSWERS
from nybble.recipe.schema import Recipe

Settings = dict[str, Any]  # ours, by path
TOOLS = {"trl": "TRL", "axolotl": "Axolotl", "llama_factory": "LLaMA-Factory"}
# Names that only one of the tools has.
_OF_AXOLOTL = ("base_model", "sequence_len", "micro_batch_size", "datasets", "sample_packing", "dataset_prepared_path")
_OF_LLAMA_FACTORY = ("stage", "finetuning_type", "cutoff_len", "lora_target", "dataset_dir", "quantization_bit")
# What a tool does where its recipe says nothing, and Nybble would do otherwise.
DEFAULTS: dict[str, Settings] = {
    "trl": {
        "training.learning_rate": 2e-5,
        "training.per_device_train_batch_size": 8,
        "training.warmup_ratio": 0.0,
        "lora.lora_dropout": 0.05,
        "data.eval_fraction": 0.0,
    },
    "axolotl": {
        "training.num_train_epochs": 1.0,
        "training.per_device_train_batch_size": 1,
        "training.lr_scheduler_type": "cosine",
        "data.max_length": 512,
        "data.eval_fraction": 0.0,
    },
    "llama_factory": {
        "training.learning_rate": 5e-5,
        "training.per_device_train_batch_size": 8,
        "training.warmup_ratio": 0.0,
        "lora.r": 8,
        "data.max_length": 2048,
        "data.eval_fraction": 0.0,
    },
}
_HELD_OUT = ("data.eval_dataset_name", "data.eval_dataset_split")
_DTYPES = {"bfloat16", "float16", "float32"}
_SAID = "remove it: "  # how an answer begins that has nothing to use instead


@dataclass(frozen=True)
class Imported:
    """A recipe of another tool, in our words."""

    tool: str  # TRL, Axolotl or LLaMA-Factory
    recipe: Recipe
    settings: Settings  # those that are written, by path
    remarks: tuple[str, ...]  # each about a setting that means something else or nothing here

    def to_yaml(self, source: str) -> str:
        """The recipe as a file, with the remarks on top; `source` is where it comes from."""
        head = [f"# From {source}, a recipe of {self.tool}."]
        if self.remarks:
            head += ["# These settings mean something else or nothing here:", *(f"#   {r}" for r in self.remarks)]
        sections: dict[str, Any] = {}
        for path, value in self.settings.items():
            section, _, name = path.rpartition(".")
            (sections.setdefault(section, {}) if section else sections)[name] = value
        order = [name for name in Recipe.model_fields if name in sections]
        text = yaml.safe_dump({name: sections[name] for name in order}, sort_keys=False, allow_unicode=True)
        return "\n".join([*head, text])


def import_recipe(path: Path | str) -> Imported:
    """Our recipe for the YAML file of another tool.

    Raises:
        RecipeError: there is no such file, it is not YAML, or nothing in it is a setting.
    """
    content = {name: value for name, value in _flat(read_yaml(path)) if value is not None}
    tool = _tool_of(content)
    conversion = _Conversion(tool, content)
    said = preferences_of(tool, content)
    conversion.settings |= said.settings
    conversion.remarks += said.remarks
    for name, value in content.items():
        if name not in said.names:
            conversion.take(name, value)
    if not conversion.settings:
        raise RecipeError(f"{path}: holds no setting of TRL, Axolotl or LLaMA-Factory; give a recipe of one of them")
    conversion.finish()
    recipe = conversion.validated()
    values = recipe.model_dump(mode="json")
    settings: Settings = {}
    for setting in conversion.settings:
        section, _, name = setting.rpartition(".")
        settings[setting] = values[section][name] if section else values[name]
    return Imported(TOOLS[tool], recipe, settings, tuple(conversion.remarks))


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name if isinstance(name, str) else shown(name), value) for name, value in content.items())


def _tool_of(content: Mapping[str, Any]) -> str:
    if any(name in content for name in _OF_LLAMA_FACTORY):
        return "llama_factory"
    return "axolotl" if any(name in content for name in _OF_AXOLOTL) else "trl"


class _Conversion:
    """Collects our settings and remarks from the names of one recipe."""

    def __init__(self, tool: str, content: Mapping[str, Any]) -> None:
        self.tool = tool
        self.content = content
        self.settings: Settings = {}
        self.remarks: list[str] = []

    def take(self, name: str, value: Any) -> None:
        """Convert one setting."""
        convert = _BY_TOOL[self.tool].get(name) or _OF_ALL.get(name)
        if convert is not None:
            try:
                self._put(convert(self, value))
            except (TypeError, ValueError, LookupError, AttributeError):
                self.remark(name, "this value is not understood and left out")
        elif name in spellings():
            self._put({spellings()[name]: value})
        elif value is not False and value != "" and value != [] and value != {}:
            self.remark(name, ANSWERS.get(name, f"{_SAID}Nybble has no such setting").removeprefix(_SAID))

    def _put(self, found: Settings) -> None:
        for path, value in found.items():
            if path in self.settings and self.settings[path] != value:
                self.remarks.append(f"{path}: is said twice, as {self.settings[path]} and {value}; the last one counts")
            self.settings[path] = value

    def remark(self, name: str, text: str) -> Settings:
        """Keep a remark; gives no settings."""
        value = clipped(brief_value(self.content.get(name)))
        self.remarks.append(f"{name}{f' ({value})' if value else ''}: {text}")
        return {}

    def finish(self) -> None:
        """Decide what is trained, and write out the tool's defaults."""
        self.settings = {"method": self._method(), **{k: v for k, v in self.settings.items() if k != "method"}}
        said = self.settings
        for path, value in DEFAULTS[self.tool].items():
            is_other = path == "training.warmup_ratio" and "training.warmup_steps" in said
            has_rows = path == "data.eval_fraction" and any(name in said for name in _HELD_OUT)
            is_unused = path.startswith("lora.") and said["method"] == "full"
            if path not in said and not (is_other or has_rows or is_unused):
                said[path] = value
        if said["method"] != "qlora" and said.pop("lora.init_lora_weights", None):
            self.remark(
                "pissa_init", "only adapters on a 4-bit base (method: qlora) start otherwise than by default here"
            )
        if isinstance(said.get("data.dataset_name"), list) and said.pop("data.max_train_rows", None):
            self.remarks.append("max_samples: of several sets, `rows` of each says how many are taken (dataset_name)")
        if self.tool == "llama_factory" and said["method"] != "full" and isinstance(said["lora.r"], int):
            said.setdefault("lora.lora_alpha", 2 * said["lora.r"])
        if self.tool == "trl" and "data.loss_on" not in said and "preferences.objective" not in said:
            self.remarks.append(
                "loss: TRL learns every token of a conversation unless assistant_only_loss is set; here only answers "
                "are learned (loss_on: all learns every token)"
            )

    def _method(self) -> str:
        content, kind = self.content, str(self.settings.get("method", ""))
        in_4_bits = content.get("load_in_4bit") or content.get("adapter") == "qlora" or content.get("quantization_bit")
        if content.get("load_in_8bit") or content.get("quantization_bit") == 8:
            name = "load_in_8bit" if content.get("load_in_8bit") else "quantization_bit"
            self.remark(name, "the base is in 4 bits (method: qlora) or 16 bits (method: lora) here; taken is qlora")
            return "qlora"
        if in_4_bits:
            return "qlora"
        has_adapter = content.get("use_peft") or content.get("adapter") == "lora" or kind == "lora"
        has_adapter = has_adapter or (self.tool == "llama_factory" and kind != "full")
        return "lora" if has_adapter else "full"

    def validated(self) -> Recipe:
        """The recipe of the settings, without those whose values are not allowed here: each gets a remark.

        Raises:
            RecipeError: settings do not go together.
        """
        while True:
            sections: dict[str, Any] = {}
            for path, value in self.settings.items():
                section, _, name = path.rpartition(".")
                (sections.setdefault(section, {}) if section else sections)[name] = value
            try:
                return Recipe.model_validate(sections)
            except ValidationError as error:
                place = [str(part) for part in error.errors(include_url=False)[0]["loc"]]
                wrong = next((p for p in self.settings if p in (".".join(place[:2]), place[0])), "") if place else ""
                if not wrong:
                    raise RecipeError(
                        f"the recipe cannot be imported: {first_fault(error)}; change that, or remove it"
                    ) from error
                value = clipped(brief_value(self.settings.pop(wrong)))
                self.remarks.append(f"{wrong}: {value} is not allowed here ({clipped(first_fault(error))})")


def brief_value(value: Any) -> str:
    """A value as one line of a remark."""
    return "" if value is None else " ".join(str(value).split())


Convert = Callable[[_Conversion, Any], Settings]


def _nothing(_all: _Conversion, _value: Any) -> Settings:
    return {}


def _to(path: str, value: Any = None) -> Convert:
    """A setting that is ours by another name, or that means `value` of ours where it is true."""

    def convert(_all: _Conversion, said: Any) -> Settings:
        if value is None:
            return {path: said}
        return {path: value} if said is True or said == "true" else {}

    return convert


def _dtype(name: str) -> Convert:
    def convert(_all: _Conversion, said: Any) -> Settings:
        return {"quantization.bnb_4bit_compute_dtype": name} if said not in (False, "false") else {}

    return convert


def _named_dtype(everything: _Conversion, said: Any) -> Settings:
    name = str(said).removeprefix("torch.")
    if name in _DTYPES:
        return {"quantization.bnb_4bit_compute_dtype": name}
    said_by = "dtype" if "dtype" in everything.content else "torch_dtype"
    return everything.remark(said_by, "bnb_4bit_compute_dtype is bfloat16 unless it is set")


def _loss_on_answers(everything: _Conversion, said: Any) -> Settings:
    return {"data.loss_on": "answers" if said else "all"}


def _loss_on_all(everything: _Conversion, said: Any) -> Settings:
    return {"data.loss_on": "all" if said else "answers"}


def _data_sets(everything: _Conversion, said: Any) -> Settings:
    """A list of data sets, as Axolotl and TRL have them."""
    paths = {"path": "data.dataset_name", "split": "data.dataset_split"}
    each = [_data_set(everything, one, "datasets", paths) for one in _listed(said)]
    if len(each) < 2:
        return each[0] if each else {}
    own = {"path": "data.dataset_name", "split": "data.dataset_split", "config": "data.dataset_config"}
    sets = [{key: one.pop(path) for key, path in own.items() if path in one} for one in each]
    shared = {path: value for path, value in each[0].items() if all(one.get(path) == value for one in each)}
    for path in sorted({path for one in each for path in one} - set(shared)):
        everything.remarks.append(f"datasets: {path} differs from set to set; it is left to what the columns say")
    return {"data.dataset_name": [one for one in sets if one], **shared}


def _test_sets(everything: _Conversion, said: Any) -> Settings:
    first, *others = _listed(said)
    if others:
        everything.remarks.append(f"test_datasets: {len(others)} more are left out; eval_dataset_name is one")
    paths = {"path": "data.eval_dataset_name", "split": "data.eval_dataset_split"}
    return _data_set(everything, first, "test_datasets", paths)


def _listed(said: Any) -> list[Any]:
    return said if isinstance(said, list) else [said]


def _data_set(everything: _Conversion, said: Any, name: str, paths: Mapping[str, str]) -> Settings:
    found: Settings = {}
    for key, value in ({"path": said} if isinstance(said, str) else dict(said)).items():
        if value is not None and key != "ds_type":
            one = _of_data_set(everything, name, key, value, paths)
            columns = [*found.get("data.columns", []), *one.get("data.columns", [])]
            found |= one | ({"data.columns": columns} if columns else {})
    return found


def _of_data_set(everything: _Conversion, name: str, key: str, value: Any, paths: Mapping[str, str]) -> Settings:
    """What one key of a data set is here."""
    is_trained_on = name == "datasets"
    if key in paths:
        return {paths[key]: str(value)}
    if key == "data_files":
        return {paths["path"]: value[0] if isinstance(value, list) and value else value}
    if is_trained_on and key == "name":
        return {"data.dataset_config": value}
    if is_trained_on and key in ("field", "text_column"):
        return {"data.dataset_text_field": value}
    if is_trained_on and key == "chat_template":
        return _chat_template(everything, value)
    if is_trained_on and key == "type" and str(value) in _FORMATS:
        return {"data.data_format": _FORMATS[str(value)]}
    if is_trained_on and key == "type" and "rl" in everything.content and str(value).endswith(_PREFERENCES):
        return {}  # read from the columns
    if is_trained_on and key in _COLUMNS:
        return {"data.columns": [f"{_COLUMNS[key]}={value}"]}
    text = ANSWERS.get(key, f"{_SAID}columns are found by their usual names, or by `columns`").removeprefix(_SAID)
    everything.remarks.append(f"{name}.{key} ({clipped(brief_value(value))}): {text}")
    return {}


# Axolotl's types of rows -> ours; a chat is read from its columns, whichever they are.
_COLUMNS = {"field_messages": "messages", "field_chosen": "chosen", "field_rejected": "rejected"}
# Ends of the names of its types of pairs whose columns have the names that are looked for.
_PREFERENCES = (".default", ".intel", ".argilla", ".argilla_chat", ".ultra", ".icr", ".prompt_pairs")
_FORMATS = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt", "chat_template": "auto"}


def _chat_template(everything: _Conversion, said: Any) -> Settings:
    if said in ("inst", "chatml") or str(said).endswith(".jinja"):
        return {"data.chat_template": said}
    if said not in ("tokenizer_default", "default"):
        name = "chat_template" if "chat_template" in everything.content else "template"
        everything.remark(name, "the tokenizer's own template is used; give a .jinja file for another one")
    return {}


def _names_of_data_sets(everything: _Conversion, said: Any) -> Settings:
    """LLaMA-Factory's `dataset`: names in its dataset_info.json, or files."""
    names = [part.strip() for part in said.split(",")] if isinstance(said, str) else list(said)
    if not names:
        return {}
    if any(not Path(name).suffix for name in names):
        text = (
            "names of dataset_info.json are not known here; dataset_name is the path of a file or folder, or a hub id"
        )
        everything.remark("dataset", text)
    return {"data.dataset_name": names[0] if len(names) == 1 else [{"path": name} for name in names]}


def _held_out(everything: _Conversion, said: Any) -> Settings:
    if isinstance(said, int | float) and said > 1:
        said_by = "val_set_size" if "val_set_size" in everything.content else "val_size"
        everything.remark(said_by, "a number of rows; here eval_fraction is held out, at most max_eval_rows")
        return {"evaluation.max_eval_rows": int(said)}
    return {"data.eval_fraction": said}


def _times_an_epoch(path: str, strategy: str) -> Convert:
    def convert(everything: _Conversion, said: Any) -> Settings:
        epochs = everything.content.get("num_epochs", 1)
        if not isinstance(said, int | float) or not isinstance(epochs, int | float) or said * epochs <= 0:
            return {strategy: "no"}
        if said == 1:
            return {strategy: "epoch"}
        return {strategy: "steps", path: 1 / (said * epochs)}  # as Axolotl computes it

    return convert


def _attention(name: str) -> Convert:
    return lambda _all, said: {"model.attn_implementation": name} if said is True else {}


def _flash(everything: _Conversion, said: Any) -> Settings:
    if said is True or said == "fa2":
        text = "attention over rows without padding is built in; attn_implementation takes flash_attention_2"
        return everything.remark("flash_attn" if "flash_attn" in everything.content else "flash_attention", text)
    return {}


def _least_rate(everything: _Conversion, said: Any) -> Settings:
    everything.settings.pop("training.lr_scheduler_type", None)  # cosine, of which this is another kind
    return {
        "training.lr_scheduler_type": "cosine_with_min_lr",
        "training.lr_scheduler_kwargs": {"min_lr_rate": float(said)},
    }


def _several_processes(name: str) -> Convert:
    def convert(everything: _Conversion, said: Any) -> Settings:
        if not said:
            return {}
        everything.remark(name, "weights in shards are distributed: fsdp; start the processes with torchrun")
        return {"training.distributed": "fsdp"}

    return convert


def _kind(everything: _Conversion, said: Any) -> Settings:
    if said not in ("lora", "full"):
        return everything.remark("finetuning_type", "method is qlora, lora or full; taken is lora, or qlora in 4 bits")
    return {"method": said}


_OF_ALL: dict[str, Convert] = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "use_peft", "do_train", "overwrite_output_dir"), _nothing),
    "bf16": _dtype("bfloat16"),
    "fp16": _dtype("float16"),
    "dtype": _named_dtype,
    "torch_dtype": _named_dtype,
    "use_cpu": _to("model.device", "cpu"),
    "full_determinism": _to("training.deterministic", True),
    "deepspeed": _several_processes("deepspeed"),
    "fsdp": _several_processes("fsdp"),
    "fsdp_config": _nothing,  # said at fsdp
    "lr_scheduler_kwargs": _to("training.lr_scheduler_kwargs"),
    "chat_template": _chat_template,
}
_BY_TOOL: dict[str, dict[str, Convert]] = {
    "trl": {
        "assistant_only_loss": _loss_on_answers,
        "completion_only_loss": _loss_on_answers,
        "chat_template_path": _chat_template,
        "datasets": _data_sets,
    },
    "axolotl": {
        "adapter": _nothing,  # decides the method
        "datasets": _data_sets,
        "test_datasets": _test_sets,
        "train_on_inputs": _loss_on_all,
        "lora_target_linear": _to("lora.target_modules", "all-linear"),
        "tokenizer_config": _to("model.tokenizer_name_or_path"),
        "peft_use_dora": _to("lora.use_dora"),
        "peft_use_rslora": _to("lora.use_rslora"),
        "val_set_size": _held_out,
        "evals_per_epoch": _times_an_epoch("evaluation.eval_steps", "evaluation.eval_strategy"),
        "saves_per_epoch": _times_an_epoch("training.save_steps", "training.save_strategy"),
        "eval_max_new_tokens": _to("evaluation.max_new_tokens"),
        "tokens": _to("lora.new_tokens"),
        "noisy_embedding_alpha": _to("training.neftune_noise_alpha"),
        "cosine_min_lr_ratio": _least_rate,
        "flash_attention": _flash,
        "eager_attention": _attention("eager"),
        "sdp_attention": _attention("sdpa"),
        "wandb_name": _to("training.run_name"),
    },
    "llama_factory": {
        "add_special_tokens": _to("lora.new_tokens"),
        "stage": lambda _all, said: {"data.loss_on": "all"} if said == "pt" else {},
        "finetuning_type": _kind,
        "quantization_bit": _nothing,  # decides the method
        "quantization_type": _to("quantization.bnb_4bit_quant_type"),
        "dataset": _names_of_data_sets,
        "template": _chat_template,
        "val_size": _held_out,
        "train_on_prompt": _loss_on_all,
        "mask_history": _to("data.loss_on", "last_answer"),
        "neat_packing": _to("data.packing", True),
        "pissa_init": _to("lora.init_lora_weights", "pissa"),
        "flash_attn": _flash,
        "pure_bf16": _dtype("bfloat16"),
    },
}
