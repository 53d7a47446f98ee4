"""Every setting of a recipe, defined once: default, unit, meaning, limits, other tools' names for it.

Names are those of transformers, PEFT and bitsandbytes. The command line's flags, its help, `docs/guide/settings.md` and
the JSON schema for editors are all derived from here. A setting's name is unique over all sections, so a recipe may be
written flat or in sections.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    aliases: tuple[str, ...] = (),
    neutral: bool = False,
    **limits: Any,
) -> Any:
    """One setting: `meaning` and `unit` go to help and docs, `aliases` are other names, `limits` are pydantic's.

    `neutral` ones decide nothing of what is learned, or name what counts by its content: a resumed run may change them.
    """
    extra: dict[str, Any] = {"unit": unit, "aliases": list(aliases), "neutral": neutral}
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


Rate = Annotated[float, Field(gt=0)] | Literal["probe"]
Tokens = Annotated[int, Field(ge=8)]


class Section(BaseModel):
    """A group of settings that one stage takes; frozen, and unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1; a flag without its value must not become one."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted in (int, float, int | None, float | None, Rate):
            raise ValueError(f"input should be a number, not {str(value).lower()}")
        return value


class ModelSection(Section):
    """The base model and where it runs."""

    model_name_or_path: str = setting(
        "",
        "folder or hub id of the base model",
        aliases=("model", "model_name", "base_model", "model_id"),
        neutral=True,
    )
    model_revision: str | None = setting(
        None, "branch, tag or commit of a hub model", aliases=("revision",), neutral=True
    )
    tokenizer_name_or_path: str | None = setting(
        None, "folder or hub id of the tokenizer, if not the model's own", neutral=True
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", "attention of transformers", neutral=True
    )
    device: Literal["auto", "cpu", "cuda", "hip"] = setting(
        "auto", "where to run: the GPU if torch sees one", neutral=True
    )
    paths: tuple[str, ...] = setting(
        (),
        "operators that take another path than the doctor's: dequantize_4bit=torch, comma between (nybble doctor)",
        aliases=("path",),
        neutral=True,
    )
    trust_remote_code: bool = setting(False, "run Python code that a hub repository brings")

    @field_validator("paths", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _split_names(value) if isinstance(value, str) else value


class QuantizationSection(Section):
    """How the base is stored under `method: qlora`."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "the 16 values", aliases=("quant_type",))
    encoder: Literal["absmax", "search", "calibrated"] = setting(
        "search",
        "how scales and codes are chosen: as bitsandbytes does, by least error, or fitted to the inputs that the rows "
        "make of each layer; the bytes have one format",
    )
    signed_scales: bool = setting(
        True, "a searched scale may be negative (exact in bitsandbytes); false for readers that expect none"
    )
    calibration_rows: int = setting(128, "rows that calibration looks at", unit="rows", ge=1)
    cache: bool = setting(
        True,
        "keep the packed base and the tokenized rows on disk, so that the next start need not make them again",
        neutral=True,
    )
    cache_limit: float = setting(
        64, "disk that all kept bases and rows may take; the least recently used go", unit="GiB", gt=0, neutral=True
    )
    bnb_4bit_use_double_quant: bool = setting(
        True,
        "store the blocks' scales in 8 bits (saves 0.37 bit a weight)",
        aliases=("double_quantization", "use_double_quant", "use_bnb_nested_quant"),
    )
    bnb_4bit_blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = setting(
        64, "weights that share a scale", unit="weights", aliases=("blocksize", "block_size")
    )
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16",
        "type of the arithmetic, for every method; float16 becomes bfloat16 on a CPU",
        aliases=("compute_dtype",),
    )
    skip_modules: tuple[str, ...] = setting(
        (), "linears to leave in 16 bits besides lm_head", aliases=("llm_int8_skip_modules",)
    )

    @field_validator("skip_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _split_names(value) if isinstance(value, str) else value

    @field_validator("bnb_4bit_blocksize", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value


class LoraSection(Section):
    """The adapters, in PEFT's words; not used by `method: full`."""

    r: int = setting(16, "rank", aliases=("lora_r", "lora_rank", "rank"), ge=1, le=4096)
    lora_alpha: float = setting(32, "scale: the adapter's output is multiplied by alpha / r", gt=0)
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", ge=0, lt=1)
    target_modules: str | tuple[str, ...] = setting(
        "all-linear",
        "names of the linears that get an adapter, or all-linear",
        aliases=("lora_target_modules", "lora_target", "lora_modules"),
    )
    init_lora_weights: Literal["default", "loftq", "qera", "pissa"] = setting(
        "default",
        "how adapters start: from nothing, from what 4 bits lost (loftq: of the weights, qera: of the outputs), or "
        "from the weights' principal part (pissa); all but the first tie the adapter to this run's base",
        aliases=("init",),
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(r) instead")
    use_dora: bool = setting(False, "learn magnitudes apart from directions (DoRA)")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value:
            return _split_names(value)
        return "all-linear" if value in ("all", "all_linear") else value


class DataSection(Section):
    """The rows, and which of their tokens are learned."""

    dataset_name: str = setting(
        "",
        "rows: a parquet, json, jsonl, csv or text file, a folder of them, or a hub id",
        aliases=("dataset", "dataset_path", "data", "train_file"),
        neutral=True,
    )
    dataset_split: str = setting(
        "train",
        "split of a hub data set or a folder; of a folder, by words in the files' names: train, validation, test",
        aliases=("split", "dataset_train_split"),
        neutral=True,
    )
    dataset_config: str | None = setting(
        None, "which of the sets that a hub id holds", aliases=("dataset_config_name",), neutral=True
    )
    dataset_num_proc: int | None = setting(
        None,
        "processes that tokenize; default: one a core, at most 16",
        aliases=("preprocessing_num_workers",),
        ge=1,
        neutral=True,
    )
    data_format: Literal["auto", "text", "prompt_completion", "alpaca", "sharegpt", "messages"] = setting(
        "auto", "shape of the rows", aliases=("format_type", "dataset_format")
    )
    dataset_text_field: str = setting("text", "column that holds the text", aliases=("text_column",))
    chat_template: str | None = setting(
        None,
        "template for rows with turns: inst, chatml or a .jinja file; default: the tokenizer's own",
        aliases=("template",),
    )
    loss_on: Literal["answers", "last_answer", "all"] = setting(
        "answers", "tokens that are learned: of every answer, of each row's last answer, or all; with the end tokens"
    )
    allow_no_stop: bool = setting(
        False, "train although no answer keeps its end token, so that the model will not learn to stop"
    )
    overlong: Literal["truncate", "drop", "split"] = setting(
        "truncate",
        "what becomes of rows above max_length: cut, left out, or parted between a turn and the next question into "
        "rows of their own; counted aloud",
    )
    max_length: int = setting(
        1024,
        "length of a row; what becomes of longer ones says overlong",
        unit="tokens",
        aliases=("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"),
        ge=8,
    )
    packing: bool | Tokens = setting(
        False,
        "fill each row's place with as many rows as max_length takes, or as this many tokens take; none sees another",
        aliases=("sample_packing",),
    )
    eval_dataset_name: str | None = setting(
        None, "held-out rows of their own", aliases=("eval_dataset", "eval_file"), neutral=True
    )
    eval_dataset_split: str | None = setting(
        None,
        "split that holds the held-out rows, of eval_dataset_name or else of dataset_name",
        aliases=("eval_split", "dataset_test_split"),
        neutral=True,
    )
    eval_fraction: float = setting(
        0.05,
        "share of the rows held out when there is no held-out file or split",
        aliases=("val_set_size", "val_size"),
        ge=0,
        lt=1,
    )
    eval_seed: int | None = setting(None, "seed that draws the held-out rows; default: that of training", ge=0)
    max_train_rows: int | None = setting(None, "use only the first rows", unit="rows", aliases=("max_samples",), ge=1)


class TrainingSection(Section):
    """The run."""

    output_dir: str = setting("runs/latest", "folder of the run", neutral=True)
    num_train_epochs: float = setting(3.0, "passes over the rows", aliases=("epochs", "num_epochs"), gt=0)
    max_steps: int = setting(-1, "stop after so many optimizer steps; -1: by epochs", unit="steps", ge=-1)
    per_device_train_batch_size: int = setting(
        4,
        "rows a micro-batch; times gradient_accumulation_steps, the rows of a step, which several processes share",
        unit="rows",
        aliases=("micro_batch_size", "batch_size"),
        ge=1,
        neutral=True,
    )
    gradient_accumulation_steps: int = setting(
        1, "micro-batches an optimizer step", aliases=("grad_accum",), ge=1, neutral=True
    )
    learning_rate: Rate = setting(
        2e-4, "peak learning rate; probe: the best of five, each tried in a small part of the run", aliases=("lr",)
    )
    lr_scheduler_type: str = setting("linear", "schedule, by its transformers name", aliases=("lr_scheduler",))
    warmup_ratio: float = setting(0.03, "share of the steps that warm up", ge=0, lt=1)
    weight_decay: float = setting(0.0, "decoupled weight decay", ge=0)
    adam_beta1: float = setting(0.9, "decay of Adam's first moment", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "decay of Adam's second moment", ge=0, lt=1)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0: never", aliases=("grad_clip",), ge=0)
    optim: str = setting("adamw_torch_fused", "optimizer, by its transformers name", aliases=("optimizer",))
    gradient_checkpointing: Literal["auto", "never", "always"] = setting(
        "auto",
        "recompute layers in the backward pass: as many as memory forces, none, or all; true means always",
        neutral=True,
    )
    distributed: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "several processes: each holds the whole model (ddp), or a shard of every weight (fsdp, torch's FSDP2)",
        neutral=True,
    )
    fsdp_cpu_offload: bool = setting(
        False,
        "with distributed: fsdp, the shards wait in host memory, where the optimizer works too; a device holds what it "
        "computes with alone; slower",
        neutral=True,
    )
    fsdp_shards: int | None = setting(
        None,
        "with distributed: fsdp, processes that share one copy of the model, e.g. those of a machine; default: all",
        ge=2,
        neutral=True,
    )
    memory_budget: str | None = setting(
        None, "memory that training may take, e.g. 8GiB; default: what the device has free", neutral=True
    )
    lean: Literal["auto", "never", "always"] = setting(
        "auto",
        "below recomputing every layer: layer inputs and the embedding table wait on the host, the MLP runs in tiles, "
        "weights are decoded in slices; as much of it as memory forces, none, or all; slower, and nothing that is "
        "learned changes; true means always",
        neutral=True,
    )
    parity_steps: int = setting(
        0,
        "run so many first steps on the plain path too, and stop if the fast one computes something else",
        ge=0,
        neutral=True,
    )
    logging_steps: int = setting(10, "a line in events.jsonl every so many steps", unit="steps", ge=1, neutral=True)
    save_steps: int = setting(500, "a checkpoint every so many steps", unit="steps", ge=1, neutral=True)
    save_total_limit: int = setting(2, "checkpoints kept", ge=1, neutral=True)
    spare_dir: str | None = setting(
        None, "folder on another disk for checkpoints that output_dir cannot take", neutral=True
    )
    max_seconds: float | None = setting(
        None, "time the whole run may take: it saves and stops before", unit="seconds", neutral=True, gt=0
    )
    deterministic: bool = setting(
        False, "on a GPU: only what adds in a fixed order, so that two runs have the same bits; slower", neutral=True
    )
    bad_batch: Literal["stop", "skip"] = setting(
        "stop", "what a loss or gradient that is no number, or a spike of the gradient, leads to", neutral=True
    )
    grad_spike: float = setting(
        1000.0,
        "a gradient norm so many times the median of the last 100 steps is a spike; 0: never",
        neutral=True,
        ge=0,
    )
    seed: int = setting(42, "seed of order, adapters and dropout", ge=0)
    report_to: str = setting(
        "auto", "trackers by their transformers names, comma between; auto: tensorboard if installed", neutral=True
    )
    run_name: str | None = setting(None, "name for trackers", neutral=True)
    push_to_hub: bool = setting(False, "upload the adapter to the hub at the end", neutral=True)
    hub_model_id: str | None = setting(None, "repository for push_to_hub", neutral=True)

    @field_validator("gradient_checkpointing", "lean", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return {"true": "always", "false": "never"}.get(str(value).lower(), value)

    @field_validator("report_to", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(value) if isinstance(value, list) else value


class EvaluationSection(Section):
    """What is measured on held-out rows, and the answers that are shown."""

    per_device_eval_batch_size: int = setting(
        16, "rows at a time in evaluation", unit="rows", aliases=("eval_batch_size",), ge=1, neutral=True
    )
    eval_steps: int = setting(
        0, "evaluate every so many steps; 0: before and after only", unit="steps", ge=0, neutral=True
    )
    max_eval_rows: int = setting(500, "held-out rows used at most", unit="rows", ge=1, neutral=True)
    answer_field: str = setting(
        "answer", "column with the exact answer; where rows have it, exact match is measured", neutral=True
    )
    max_new_tokens: int = setting(64, "length of generated answers", unit="tokens", ge=1, neutral=True)
    n_samples: int = setting(3, "held-out prompts answered by base and tuned model in the report", ge=0, neutral=True)


class Recipe(Section):
    """A whole run, as data."""

    method: Literal["qlora", "lora", "full"] = setting(
        "qlora", "4-bit base + adapters, 16-bit base + adapters, or every parameter", aliases=("finetuning_type",)
    )
    model: Annotated[ModelSection, Field(description="base model")] = ModelSection()
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.training.push_to_hub and not self.training.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id; name the repository, e.g. --hub_model_id you/adapter")
        if self.training.fsdp_cpu_offload and self.training.distributed != "fsdp":
            raise ValueError("fsdp_cpu_offload moves shards; use it with distributed: fsdp, or leave it away")
        if self.training.fsdp_shards and self.training.distributed != "fsdp":
            raise ValueError("fsdp_shards counts shards; use it with distributed: fsdp, or leave it away")
        if self.lora.init_lora_weights != "default" and (self.method != "qlora" or self.lora.use_dora):
            raise ValueError(
                f"init_lora_weights {self.lora.init_lora_weights!r} starts plain LoRA on a 4-bit base; "
                "use it with method: qlora and without use_dora, or set it to default"
            )
        return self
