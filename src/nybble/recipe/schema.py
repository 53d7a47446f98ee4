"""Every setting of a recipe, defined once: default, unit, meaning, limits, other tools' names for it.

Names are those of transformers, PEFT and bitsandbytes. The command line's options, its help, `docs/guide/settings.md`
and the JSON schema for editors are all derived from here. A setting's name is unique over all sections, so a recipe may
be written flat or in sections.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nybble.guard import shown
from nybble.recipe.preferences import PreferencesSection
from nybble.recipe.setting import (
    MAX_ROWS,
    Bytes,
    BytesOrGiB,
    NumberedGpu,
    Numbers,
    Rate,
    Section,
    Steps,
    StepsOrEpochs,
    StepsOrNone,
    Tokens,
    check_pattern,
    is_name,
    setting,
    split_names,
    split_numbers,
)

# What the setting `columns` can name.
COLUMN_ROLES = (
    "prompt", "completion", "question", "answer", "messages", "input", "system", "history", "tools", "reasoning",
    "chosen", "rejected", "label"
)  # fmt: skip


class ModelSection(Section):
    """The base model and where it runs."""

    model_name_or_path: str = setting(
        "",
        "Folder, GGUF file or hub id of the base model.",
        unset="none; it must be given",
        aliases=("model", "model_name", "base_model", "model_id"),
        neutral=True,
    )
    model_revision: str | None = setting(
        None, "Branch, tag or commit of a hub model.", unset="the main branch", aliases=("revision",), neutral=True
    )
    tokenizer_name_or_path: str | None = setting(
        None, "Folder or hub id of the tokenizer.", unset="the model's own", neutral=True
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting(
        "auto",
        "Attention implementation of transformers; auto takes sdpa, or eager for families whose class refuses sdpa. "
        "With auto and sdpa Nybble's own attention over rows without padding takes its place in training.",
        neutral=True,
    )
    device: Literal["auto", "cpu", "cuda", "hip"] | NumberedGpu = setting(
        "auto",
        "Device to run on: one, however many there are. auto takes the GPU if torch sees one; cuda:1 is the second.",
        neutral=True,
    )
    paths: tuple[str, ...] = setting(
        (),
        "Backends that replace the doctor's choice for single operators, as dequantize_4bit=torch, separated by commas "
        "(see nybble doctor).",
        unset="the doctor's choice",
        aliases=("path",),
        neutral=True,
    )
    trust_remote_code: bool = setting(False, "Run the Python code that a hub repository contains.")

    @field_validator("paths", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return split_names(value) if isinstance(value, str) else value


class QuantizationSection(Section):
    """How the base model is stored under `method: qlora`."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting(
        "nf4", "The codebook: which 16 values the 4 bits stand for.", aliases=("quant_type",)
    )
    encoder: Literal["absmax", "search", "calibrated"] = setting(
        "search",
        "How scales and codes are chosen: absmax as bitsandbytes does, search for the least error of the weights, "
        "calibrated for the least error of the layers' outputs on your rows. All three write the same format.",
    )
    signed_scales: bool = setting(
        True,
        "Allow the search to choose negative scales, which bitsandbytes decodes exactly; set it to false for readers "
        "that expect none.",
    )
    calibration_rows: int = setting(128, "Rows that calibration reads.", unit="rows", ge=1, le=10**6)
    cache: bool = setting(
        True,
        "Keep the packed base and the tokenized rows on disk, so that the next start does not compute them again.",
        neutral=True,
    )
    cache_limit: BytesOrGiB = setting(
        64 * 2**30,
        "Disk space that all cached bases and rows may take, as 64GiB; a number without a unit counts GiB. The least "
        "recently used are removed.",
        neutral=True,
    )
    bnb_4bit_use_double_quant: bool = setting(
        True,
        "Store the scales of the blocks in 8 bits, which saves 0.37 bit per weight.",
        aliases=("double_quantization", "use_double_quant", "use_bnb_nested_quant"),
    )
    bnb_4bit_blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = setting(
        64, "Weights that share one scale.", unit="weights", aliases=("blocksize", "block_size")
    )
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16",
        "Data type of the computation, for every method; float16 becomes bfloat16 on a CPU.",
        aliases=("compute_dtype",),
    )
    skip_modules: tuple[str, ...] = setting(
        (),
        "Names of linear layers, separated by commas, that stay in 16 bits besides lm_head.",
        unset="none",
        aliases=("llm_int8_skip_modules",),
    )

    @field_validator("skip_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return split_names(value) if isinstance(value, str) else value

    @field_validator("bnb_4bit_blocksize", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value


class LoraSection(Section):
    """The adapters, in PEFT's words; `method: full` does not use them."""

    r: int = setting(16, "Rank of the adapters.", aliases=("lora_r", "lora_rank", "rank"), ge=1, le=4096)
    lora_alpha: float = setting(32, "Scale of the adapters: their output is multiplied by lora_alpha / r.", gt=0)
    lora_dropout: float = setting(0.0, "Dropout probability on the input of the adapters.", ge=0, lt=1)
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = setting(
        {},
        "Ranks of single linear layers that differ from r, as {down_proj: 32}. A key is the end of a layer's name or a "
        "regular expression; the first one that matches counts.",
        unset="r everywhere",
        aliases=("lora_rank_pattern",),
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = setting(
        {},
        "Values of lora_alpha for single linear layers, as {down_proj: 64}; keys are those of rank_pattern.",
        unset="lora_alpha everywhere",
        aliases=("lora_alpha_pattern",),
    )
    target_modules: str | tuple[str, ...] = setting(
        "all-linear",
        "The linear layers and experts that get an adapter: the ends of their names, separated by commas, or "
        "all-linear, or one regular expression that matches whole names, as .*layers\\.[0-7]\\..*_proj.",
        aliases=("lora_target_modules", "lora_target", "lora_modules"),
    )
    exclude_modules: str | tuple[str, ...] = setting(
        (),
        "Linear layers and experts that get no adapter although target_modules names them, in the same form.",
        unset="none",
        aliases=("lora_exclude_modules",),
    )
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        (),
        "Numbers of the decoder layers that get adapters, from 0, separated by commas.",
        unset="all of them",
        aliases=("lora_layers_to_transform", "peft_layers_to_transform"),
    )
    layers_pattern: tuple[str, ...] = setting(
        (),
        "Names of the list of layers that layers_to_transform counts, where a model has several.",
        unset="any list of layers",
        aliases=("lora_layers_pattern", "peft_layers_pattern"),
    )
    modules_to_save: tuple[str, ...] = setting(
        (),
        "Modules beside the adapters that are trained whole and saved with them, as lm_head, embed_tokens or norm: the "
        "ends of their names, separated by commas. They must not be packed in 4 bits.",
        unset="none",
        aliases=("lora_modules_to_save", "additional_target"),
    )
    new_tokens: tuple[str, ...] = setting(
        (),
        "Tokens that are added to the tokenizer, separated by commas, as <tool>,</tool>. Their rows of embeddings and "
        "head start as the mean of all tokens and are learned with the adapters (PEFT's trainable_token_indices); a "
        "token that is known already keeps its row as the start.",
        unset="none",
        aliases=("add_tokens",),
    )
    init_lora_weights: Literal["default", "loftq", "qera", "pissa"] = setting(
        "default",
        "How the adapters start: default changes nothing at first; loftq restores what 4 bits lost of the weights, "
        "qera what they lost of the outputs; pissa takes the principal part of the weights. All but default tie the "
        "adapter to the base of this run.",
        aliases=("init",),
    )
    adapter_name_or_path: str | None = setting(
        None,
        "Folder of an adapter, or of the run that made it, from which training continues; its rank, scale, layers, "
        "modules_to_save and new_tokens are taken over.",
        unset="a fresh adapter",
        aliases=("adapter_path", "lora_model_dir", "resume_adapter"),
        neutral=True,
    )
    use_rslora: bool = setting(False, "Scale the adapters by lora_alpha / sqrt(r) instead (rsLoRA).")
    use_dora: bool = setting(False, "Learn the magnitudes of the weights separately from their directions (DoRA).")

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _names_or_pattern(cls, value: Any) -> Any:
        if isinstance(value, str):
            names = split_names(value)
            if len(names) != 1 and all(is_name(name) for name in names):
                return names
        return "all-linear" if value in ("all", "all_linear") else value

    @field_validator("target_modules", "exclude_modules", "modules_to_save")
    @classmethod
    def _usable(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            check_pattern(value)
        for name in value if isinstance(value, tuple) else ():
            if not is_name(name):
                raise ValueError(
                    f"{shown(name)} is not the end of a name; give a regular expression alone, not in a list"
                )
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            check_pattern(pattern)
        return value

    @field_validator("new_tokens")
    @classmethod
    def _tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for token in value:
            if not token.strip() or value.count(token) > 1:
                raise ValueError(f"{token!r} is {'given twice' if token.strip() else 'empty'}; give each token once")
        return value

    @field_validator("layers_pattern", "modules_to_save", "new_tokens", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return split_names(value) if isinstance(value, str) else value

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return split_numbers(value)

    @model_validator(mode="after")
    def _layers_are_counted(self) -> LoraSection:
        targets = self.target_modules
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("layers_pattern says which layers layers_to_transform counts; set that too, or remove it")
        if self.layers_to_transform and isinstance(targets, str) and targets != "all-linear" and not is_name(targets):
            raise ValueError(
                f"target_modules {shown(targets)} is a regular expression, to which layers_to_transform does not "
                "apply; write the numbers of the layers into it, or give names"
            )
        return self


DataFormat = Literal[
    "auto", "text", "prompt_completion", "qa", "alpaca", "sharegpt", "messages", "preference", "unpaired_preference"
]
_OF_EACH_SET = ("data_format", "columns", "ignore_columns")  # settings that a set may have of its own


def _as_names(value: Any) -> Any:
    return split_names(value) if isinstance(value, str) else value


def _checked_roles(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    roles = [pair.partition("=")[0] for pair in value or ()]
    for pair, role in zip(value or (), roles, strict=True):
        if role not in COLUMN_ROLES or not pair.partition("=")[2] or roles.count(role) > 1:
            raise ValueError(
                f"{shown(pair)} names no column; write role=column once a role, with one of {', '.join(COLUMN_ROLES)}"
            )
    return value


class DataSet(BaseModel):
    """One of several sets of training rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str = Field(min_length=1, description="A file, a folder, or a hub id.")
    weight: float = Field(
        1, gt=0, le=1000, description="How often each row is taken: 2 takes the set twice, 0.5 half of it."
    )
    rows: int | None = Field(
        None, ge=1, le=10**8, description="Take this many of the first rows instead, repeating them if needed."
    )
    split: str | None = Field(None, description="Its split; dataset_split by default.")
    config: str | None = Field(None, description="Its configuration on the hub; dataset_config by default.")
    data_format: DataFormat | None = Field(None, description="Format of its rows; data_format by default.")
    columns: tuple[str, ...] | None = Field(None, description="What its columns hold; columns by default.")
    ignore_columns: tuple[str, ...] | None = Field(
        None, description="Columns of it that are left out; ignore_columns by default."
    )

    _names = field_validator("columns", "ignore_columns", mode="before")(_as_names)
    _roles = field_validator("columns")(_checked_roles)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> DataSet:
        if self.rows is not None and self.weight != 1:
            raise ValueError("rows and weight both say how much of a set is taken; give one of them")
        return self


class DataSection(Section):
    """The rows, and which of their tokens are learned."""

    dataset_name: str | tuple[DataSet, ...] = setting(
        "",
        "The training rows: a parquet, json, jsonl, csv or text file, a folder of such files, or a hub id. Several "
        "sets are a list of {path, weight or rows, split, config}; their rows are mixed in proportion.",
        unset="none; it must be given",
        aliases=("dataset", "dataset_path", "data", "train_file"),
        neutral=True,
    )
    dataset_split: str = setting(
        "train",
        "Split of a hub data set or of a folder, where words in the file names tell the splits: train, validation, "
        "test.",
        aliases=("split", "dataset_train_split"),
        neutral=True,
    )
    dataset_config: str | None = setting(
        None,
        "Configuration of a hub data set that has several.",
        unset="the only one",
        aliases=("dataset_config_name",),
        neutral=True,
    )
    dataset_num_proc: int | None = setting(
        None,
        "Processes that tokenize the rows.",
        unset="one per core, at most 16",
        aliases=("preprocessing_num_workers",),
        ge=1,
        le=1024,
        neutral=True,
    )
    data_format: DataFormat = setting(
        "auto", "Format of the rows; auto reads it from their columns.", aliases=("format_type", "dataset_format")
    )
    columns: tuple[str, ...] = setting(
        (),
        "What columns with other names hold, as prompt=question,completion=response: text as it is "
        "(prompt, completion), a question with its answer for the chat template (question, answer), messages, the two "
        "answers of a preference (chosen, rejected) or whether an answer is good (label), or what stands beside them "
        "(input, system, history, tools, reasoning).",
        unset="by their usual names",
    )
    ignore_columns: tuple[str, ...] = setting(
        (),
        "Columns, separated by commas, that are left out although they usually hold words; a key of messages is "
        "written as messages.images.",
        unset="none",
    )
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop",
        "What happens at a row that cannot be used: stop names it and ends the run, skip leaves it out; the run "
        "reports how many were skipped and why the first ten were.",
    )
    dataset_text_field: str = setting("text", "Column that holds the text.", aliases=("text_column",))
    chat_template: str | None = setting(
        None,
        "Template for rows that are conversations: inst, chatml or a .jinja file.",
        unset="the tokenizer's own",
        aliases=("template", "chat_template_path"),
    )
    loss_on: Literal["answers", "last_answer", "tool_calls", "content", "all"] = setting(
        "answers",
        "Tokens that are learned, with the end tokens: those of every answer (its reasoning, content and tool calls), "
        "of the last answer of each row, of tool calls alone, of answers without their tool calls, or all tokens.",
    )
    reasoning: Literal["learn", "mask", "drop"] = setting(
        "learn",
        "What happens to the reasoning of answers (in a field such as reasoning_content, or in <think> tags): it is "
        "learned, is only context for the answer (mask), or is removed from the rows (drop).",
    )
    allow_no_stop: bool = setting(
        False, "Train even if no answer keeps its end token, so that the model will not learn to stop."
    )
    allow_lost_characters: bool = setting(
        False,
        "Train even if the tokenizer has no token for more than 1 % of the characters of the answers, which the model "
        "will not learn to write.",
    )
    overlong: Literal["truncate", "drop", "split"] = setting(
        "truncate",
        "What happens to rows longer than max_length: truncate cuts them, drop leaves them out, split makes several "
        "rows of them, between an answer and the next question. Text without answers is parted into pieces of "
        "max_length, unless it is dropped. The run reports how many.",
    )
    max_length: int = setting(
        1024,
        "Longest row; the setting overlong decides about longer ones.",
        unit="tokens",
        aliases=("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"),
        ge=8,
        le=2**24,
    )
    packing: bool | Tokens = setting(
        False,
        "Pack several rows into one sequence of up to max_length tokens (true) or of up to this many tokens; attention "
        "does not cross rows.",
        unit="tokens",
        aliases=("sample_packing",),
    )
    eval_dataset_name: str | None = setting(
        None,
        "A separate file, folder or hub id of held-out rows.",
        unset="none",
        aliases=("eval_dataset", "eval_file"),
        neutral=True,
    )
    eval_dataset_split: str | None = setting(
        None,
        "Split that holds the held-out rows, of eval_dataset_name if it is given, else of dataset_name.",
        unset="none",
        aliases=("eval_split", "dataset_test_split"),
        neutral=True,
    )
    eval_fraction: float = setting(
        0.05,
        "Fraction of the rows that is held out if there is no held-out file or split.",
        aliases=("val_set_size", "val_size"),
        ge=0,
        lt=1,
    )
    eval_seed: int | None = setting(
        None, "Seed that chooses the held-out rows.", unset="the seed of the training", ge=0, le=2**32 - 1
    )
    max_train_rows: int | None = setting(
        None,
        "Use only the first rows, up to this number.",
        unit="rows",
        unset="all rows",
        aliases=("max_samples",),
        ge=1,
    )

    _names = field_validator("columns", "ignore_columns", mode="before")(_as_names)
    _roles = field_validator("columns")(_checked_roles)

    @model_validator(mode="after")
    def _sets(self) -> DataSection:
        if not isinstance(self.dataset_name, str):
            if not self.dataset_name:
                raise ValueError("dataset_name names no set; write a list of {path: FILE, weight: 1}")
            if self.max_train_rows is not None:
                raise ValueError("max_train_rows is for one data set; give rows to each set in dataset_name")
            if self.eval_dataset_split is not None and self.eval_dataset_name is None:
                raise ValueError("eval_dataset_split is for one data set; name it in eval_dataset_name")
        return self

    @property
    def sets(self) -> tuple[DataSet, ...]:
        """The sets of training rows; each has what the section says of all of them, unless it says otherwise."""
        sets = self.dataset_name
        if isinstance(sets, str):
            sets = (DataSet.model_construct(path=sets),)  # an empty path is refused where rows are read
        filled = {"split": self.dataset_split, "config": self.dataset_config}
        filled |= {name: getattr(self, name) for name in _OF_EACH_SET}
        return tuple(s.model_copy(update={k: v for k, v in filled.items() if getattr(s, k) is None}) for s in sets)

    def of_set(self, part: DataSet) -> DataSection:
        """The section as it applies to the rows of one of `sets`."""
        return self.model_copy(update={name: getattr(part, name) for name in _OF_EACH_SET})

    @property
    def source(self) -> str:
        """The training rows, as a person names them."""
        return self.dataset_name if isinstance(self.dataset_name, str) else ", ".join(s.path for s in self.dataset_name)


class TrainingSection(Section):
    """The training run."""

    output_dir: str = setting("runs/latest", "Folder of the run.", neutral=True)
    num_train_epochs: float = setting(
        3.0, "Passes over the training rows.", unit="epochs", aliases=("epochs", "num_epochs"), gt=0, le=10**6
    )
    max_steps: StepsOrEpochs = setting(
        -1, "Stop after this many optimizer steps; -1 trains for num_train_epochs.", unit="steps"
    )
    per_device_train_batch_size: int = setting(
        4,
        "Rows of one micro-batch on each device. A step has per_device_train_batch_size x gradient_accumulation_steps "
        "rows on each device, unless train_batch_size is set.",
        unit="rows",
        aliases=("micro_batch_size", "batch_size"),
        ge=1,
        le=MAX_ROWS,
        neutral=True,
    )
    gradient_accumulation_steps: int = setting(
        1,
        "Micro-batches of one optimizer step on each device; with train_batch_size it follows from that.",
        unit="micro-batches",
        aliases=("grad_accum",),
        ge=1,
        le=10**6,
        neutral=True,
    )
    train_batch_size: int | None = setting(
        None,
        "Rows of one optimizer step on all devices together, for the same steps on any number of devices. Each device "
        "then takes its part in micro-batches of at most per_device_train_batch_size rows.",
        unit="rows",
        unset="per_device_train_batch_size x gradient_accumulation_steps x devices",
        aliases=("global_batch_size",),
        ge=1,
        le=10**8,
        neutral=True,
    )
    learning_rate: Rate = setting(
        2e-4,
        "Peak learning rate; probe tries five rates in a small part of the run and takes the best.",
        aliases=("lr",),
    )
    lr_scheduler_type: str = setting(
        "linear",
        "Learning rate schedule, by its name in transformers; `nybble settings lr_scheduler_type` lists them.",
        aliases=("lr_scheduler",),
    )
    lr_scheduler_kwargs: Numbers = setting(
        {},
        "Arguments of the schedule by their names in transformers, as {num_cycles: 2} for cosine_with_restarts.",
        unset="those of transformers",
    )
    warmup_ratio: float = setting(0.03, "Fraction of the steps in which the learning rate warms up.", ge=0, lt=1)
    warmup_steps: float | None = setting(
        None,
        "Steps in which the learning rate warms up, whatever warmup_ratio says; below 1, a fraction of all steps.",
        unit="steps",
        unset="warmup_ratio of all steps",
        ge=0,
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", ge=0)
    adam_beta1: float = setting(0.9, "Decay rate of Adam's first moment.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "Decay rate of Adam's second moment.", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "Added to the root of Adam's second moment.", gt=0)
    optim_args: str | None = setting(
        None,
        "Further arguments of an optimizer that transformers has them for, as rank=64,update_proj_gap=100.",
        unset="none",
    )
    loraplus_lr_ratio: float | None = setting(
        None,
        "Learning rate of the adapters' B divided by that of their A (LoRA+); learning_rate is that of A.",
        unset="the same rate",
        gt=0,
    )
    neftune_noise_alpha: float | None = setting(
        None,
        "Strength of the noise on the embeddings of training rows (NEFTune), usually 5 to 15.",
        unset="no noise",
        gt=0,
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm; 0 turns clipping off.", aliases=("grad_clip",), ge=0
    )
    optim: str = setting(
        "adamw_torch_fused",
        "Optimizer, by its name in transformers; `nybble settings optim` lists them.",
        aliases=("optimizer",),
    )
    gradient_checkpointing: Literal["auto", "never", "always"] = setting(
        "auto",
        "Activation checkpointing: recompute as many layers in the backward pass as memory requires (auto), none "
        "(never) or all (always); true means always.",
        neutral=True,
    )
    distributed: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "With several processes: each holds the whole model (ddp), or a shard of every weight (fsdp, which is torch's "
        "FSDP2).",
        neutral=True,
    )
    fsdp_cpu_offload: bool = setting(
        False,
        "With distributed: fsdp, keep the shards and the optimizer in host memory; the device holds only what it is "
        "computing with. This is slower.",
        neutral=True,
    )
    fsdp_shards: int | None = setting(
        None,
        "With distributed: fsdp, the number of processes that share one copy of the model, e.g. those of one machine.",
        unit="processes",
        unset="all processes",
        ge=2,
        neutral=True,
    )
    memory_budget: Bytes | None = setting(
        None,
        "Memory that the training may take, as 8GiB or 7.5GB.",
        unset="the memory that is free on the device",
        neutral=True,
    )
    lean: Literal["auto", "never", "always"] = setting(
        "auto",
        "Save memory beyond activation checkpointing: layer inputs and the embedding table are kept on the host, the "
        "MLP runs in tiles, weights are decoded in slices. As much of it as memory requires (auto), none (never) or "
        "all (always); true means always. It is slower and does not change what is learned.",
        neutral=True,
    )
    parity_steps: int = setting(
        0,
        "Run this many first steps with the reference operators too, and stop if the fast ones differ.",
        unit="steps",
        ge=0,
        le=10**9,
        neutral=True,
    )
    logging_steps: int = setting(
        10,
        "Steps between two lines in events.jsonl; the first and the last step are always logged.",
        unit="steps",
        ge=1,
        neutral=True,
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = setting(
        "steps",
        "When checkpoints are written: every save_steps (steps), after each epoch, after each evaluation that is the "
        "best so far (best), or never (no). All but no also write one at the end, and a run that is stopped always "
        "does.",
        neutral=True,
    )
    save_steps: Steps = setting(
        500, "Steps between two checkpoints; below 1, a fraction of all steps.", unit="steps", neutral=True
    )
    save_minutes: float = setting(
        10.0,
        "Minutes without a checkpoint after which one is written, under save_strategy steps and epoch; 0: no limit.",
        unit="minutes",
        ge=0,
        neutral=True,
    )
    save_total_limit: int = setting(
        2,
        "Checkpoints that are kept; older ones are removed, but not the best one if it is loaded at the end.",
        unit="checkpoints",
        ge=1,
        neutral=True,
    )
    spare_dir: str | None = setting(
        None,
        "Folder on another disk for checkpoints that do not fit into output_dir.",
        unset="none",
        neutral=True,
    )
    max_seconds: float | None = setting(
        None,
        "Time that the whole run may take; it saves a checkpoint and stops before the time is over.",
        unit="seconds",
        unset="no limit",
        neutral=True,
        gt=0,
        le=10**9,
    )
    deterministic: bool = setting(
        False,
        "On a GPU, use only operations that add in a fixed order, so that two runs give the same bits. This is slower.",
        neutral=True,
    )
    bad_batch: Literal["stop", "skip"] = setting(
        "stop",
        "What happens at a step whose loss or gradient is not finite, or whose gradient is a spike: stop the run, or "
        "skip the step.",
        neutral=True,
    )
    grad_spike: float = setting(
        1000.0,
        "A gradient norm of more than this many times the median of the last 100 steps is a spike; 0 turns the "
        "check off.",
        neutral=True,
        ge=0,
    )
    seed: int = setting(42, "Seed of the row order, the adapters and dropout.", ge=0, le=2**32 - 1)
    data_seed: int | None = setting(None, "Another seed for the row order.", unset="seed", ge=0, le=2**32 - 1)
    report_to: str = setting(
        "auto",
        "Trackers, by their names in accelerate, separated by commas, or none; auto takes tensorboard if it is "
        "installed. `nybble settings report_to` lists them.",
        neutral=True,
    )
    run_name: str | None = setting(None, "Name of the run in the trackers.", unset="none", neutral=True)
    push_to_hub: bool = setting(False, "Upload the adapter to the hub at the end.", neutral=True)
    hub_model_id: str | None = setting(None, "Hub repository for push_to_hub.", unset="none", neutral=True)

    @field_validator("gradient_checkpointing", "lean", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return {"true": "always", "false": "never"}.get(str(value).lower(), value)

    @field_validator("save_strategy", mode="before")
    @classmethod
    def _never(cls, value: Any) -> Any:
        return "no" if value is False else value  # what YAML reads `no` as

    @field_validator("report_to", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _joined(cls, value: Any) -> Any:
        is_names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return ",".join(value) if is_names else value


class EvaluationSection(Section):
    """What is measured on the held-out rows, and the answers that the report shows."""

    per_device_eval_batch_size: int = setting(
        16,
        "Rows of one batch in the evaluation.",
        unit="rows",
        aliases=("eval_batch_size",),
        ge=1,
        le=MAX_ROWS,
        neutral=True,
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = setting(
        None,
        "When the held-out rows are evaluated during the training: every eval_steps (steps), after each epoch, or "
        "never (no). They always are before and after it.",
        unset="steps if eval_steps is set, otherwise no",
        aliases=("evaluation_strategy",),
        neutral=True,
    )
    eval_steps: StepsOrNone = setting(
        0,
        "Steps between two evaluations; below 1, a fraction of all steps. Under eval_strategy: steps, 0 stands for "
        "logging_steps.",
        unit="steps",
        neutral=True,
    )
    load_best_model_at_end: bool = setting(
        False,
        "Keep the checkpoint of the best evaluation, and end with its weights instead of the last ones.",
    )
    metric_for_best_model: Literal["eval_loss", "eval_exact_match"] = setting(
        "eval_loss",
        "The figure of an evaluation that decides which is the best: the loss on the held-out rows, or the share of "
        "them that is answered exactly.",
    )
    greater_is_better: bool | None = setting(
        None, "Whether the greater figure is the better one.", unset="true for eval_exact_match, false for eval_loss"
    )
    early_stopping_patience: int | None = setting(
        None,
        "End the training after this many evaluations in a row that are not better than the best before them.",
        unit="evaluations",
        unset="no early stop",
        ge=1,
    )
    early_stopping_threshold: float = setting(
        0.0, "An evaluation must be better by more than this to start the patience anew.", ge=0
    )
    max_eval_rows: int = setting(500, "Largest number of held-out rows.", unit="rows", ge=1, neutral=True)
    answer_field: str = setting(
        "answer", "Column that holds the exact answer; if the rows have it, exact match is measured.", neutral=True
    )
    max_new_tokens: int = setting(
        64, "Largest length of a generated answer.", unit="tokens", ge=1, le=2**20, neutral=True
    )
    n_samples: int = setting(
        3,
        "Held-out prompts that the base and the tuned model answer in the report.",
        unit="prompts",
        ge=0,
        le=10**4,
        neutral=True,
    )

    @field_validator("eval_strategy", mode="before")
    @classmethod
    def _never(cls, value: Any) -> Any:
        return "no" if value is False else value  # what YAML reads `no` as

    @field_validator("metric_for_best_model", mode="before")
    @classmethod
    def _with_prefix(cls, value: Any) -> Any:
        return f"eval_{value}" if value in ("loss", "exact_match") else value


class Recipe(Section):
    """A whole run, as data."""

    method: Literal["qlora", "lora", "full"] = setting(
        "qlora",
        "What is trained: adapters on a 4-bit base (qlora), adapters on a 16-bit base (lora), or every parameter "
        "(full).",
        aliases=("finetuning_type",),
    )
    model: Annotated[ModelSection, Field(description="base model")] = ModelSection()
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    preferences: PreferencesSection = PreferencesSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        training, lora = self.training, self.lora
        if training.train_batch_size is not None and training.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps follows from train_batch_size; remove one of them")
        if training.push_to_hub and not training.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id; name the repository, e.g. --hub_model_id you/adapter")
        if training.loraplus_lr_ratio and self.method == "full":
            raise ValueError("loraplus_lr_ratio is about adapters; use it with method: qlora or lora, or remove it")
        if lora.adapter_name_or_path and self.method == "full":
            raise ValueError(
                "adapter_name_or_path continues with an adapter; use it with method: qlora or lora, or merge the "
                "adapter first (nybble merge)"
            )
        if training.fsdp_cpu_offload and training.distributed != "fsdp":
            raise ValueError("fsdp_cpu_offload only works with distributed: fsdp; set that, or remove fsdp_cpu_offload")
        if training.fsdp_shards and training.distributed != "fsdp":
            raise ValueError("fsdp_shards only works with distributed: fsdp; set that, or remove fsdp_shards")
        self._check_objective()
        if lora.new_tokens and self.method == "full":
            raise ValueError("new_tokens learns rows beside adapters; use it with method: qlora or lora")
        if lora.init_lora_weights != "default" and (self.method != "qlora" or lora.use_dora):
            raise ValueError(
                f"init_lora_weights {lora.init_lora_weights!r} starts plain LoRA on a 4-bit base; "
                "use it with method: qlora and without use_dora, or set it to default"
            )
        return self

    def _check_objective(self) -> None:
        preferences = self.preferences
        objective = preferences.objective
        data = self.data
        if objective == "sft":
            return
        if data.loss_on not in ("answers", "last_answer"):
            raise ValueError(
                f"objective {objective} compares whole answers; use loss_on: answers or last_answer, not {data.loss_on}"
            )
        if data.overlong == "split":
            raise ValueError(
                f"overlong: split would part answers that objective {objective} compares; use truncate or drop"
            )
        if self.training.learning_rate == "probe":
            raise ValueError(
                f"learning_rate: probe compares supervised losses; give a number under objective {objective}"
            )
        if self.method == "full" and preferences.needs_reference and not preferences.precompute_ref_log_probs:
            raise ValueError(
                f"objective {objective} with method: full needs precompute_ref_log_probs: true, because "
                "the model that training starts from is gone after the first step; set it, or use adapters"
            )
