"""What transformers, TRL, PEFT, Axolotl and LLaMA-Factory have a setting for and Nybble does without, or has otherwise.

Each answer completes the line "unknown setting 'NAME'; ..": it says what does the same here, or why nothing is needed.
"""

from __future__ import annotations


def _all(names: str, answer: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), answer)


_REMOVE = "remove it: "
_LAUNCHED = "remove it: torchrun starts the processes, and `distributed` is ddp or fsdp"
_TENSORBOARD = (
    "use report_to and run_name; a tracker's own variables, such as WANDB_PROJECT, are read from the environment"
)
_WHOLE = "train everything with method: full, or remove it"
_KINDS = "remove it: LoRA, rsLoRA (use_rslora) and DoRA (use_dora) are the kinds of adapters that can be trained"

ANSWERS: dict[str, str] = {
    # what is trained, and in which precision
    **_all("load_in_4bit quantization_bit adapter use_peft", "use method: qlora"),
    "load_in_8bit": "use method: qlora (4 bits) or method: lora (16 bits)",
    **_all("bf16 pure_bf16 bfloat16", "use bnb_4bit_compute_dtype: bfloat16"),
    **_all("fp16 float16", "use bnb_4bit_compute_dtype: float16"),
    **_all("dtype torch_dtype", "use bnb_4bit_compute_dtype: bfloat16, float16 or float32"),
    **_all("bf16_full_eval fp16_full_eval", _REMOVE + "an evaluation computes as a training step does"),
    "tf32": _REMOVE + "the computation is in bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage": _REMOVE + "packed weights are stored as bytes, sharded as they are",
    "quantization_type": "use bnb_4bit_quant_type: nf4 or fp4",
    "quantization_method": _REMOVE + "the format is bitsandbytes' 4 bits; `encoder` says how it is filled",
    # the model
    "model_init_kwargs": "use the settings of the model: model_revision, attn_implementation, trust_remote_code",
    **_all("use_cache", _REMOVE + "training keeps no cache of keys and values, and generation always does"),
    **_all("flash_attention flash_attn sdp_attention eager_attention xformers_attention", "use attn_implementation"),
    **_all(
        "use_liger_kernel liger_kernel_config enable_liger_kernel use_unsloth",
        _REMOVE + "Nybble has its own fused blocks; `paths` chooses their backends",
    ),
    **_all(
        "torch_compile torch_compile_backend torch_compile_mode",
        _REMOVE + "the step is made of fused operators already; see nybble doctor",
    ),
    **_all("activation_checkpointing", "use gradient_checkpointing: auto, never or always"),
    **_all(
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        _REMOVE + "gradient_checkpointing: auto recomputes as many layers as memory requires, without reentrance",
    ),
    "activation_offloading": "use lean: auto, which keeps inputs of layers on the host where memory requires it",
    "router_aux_loss_coef": _REMOVE + "the auxiliary loss of routers is not part of the loss here",
    "use_cpu": "use device: cpu",
    "no_cuda": "use device: cpu",
    # adapters
    **_all("bias fan_in_fan_out lora_bias", _REMOVE + "adapters have no bias and follow the layout of their layer"),
    **_all(
        "trainable_token_indices tokens added_tokens add_special_tokens new_special_tokens",
        "use new_tokens with the texts of the tokens",
    ),
    **_all(
        "target_parameters lora_target_parameters",
        "use target_modules, which names experts too, as experts.down_proj",
    ),
    "lora_target_linear": "use target_modules: all-linear",
    "pissa_init": "use init_lora_weights: pissa",
    **_all("loftq_config", "use init_lora_weights: loftq"),
    **_all(
        "eva_config corda_config lora_ga_config",
        "use init_lora_weights: default, loftq, qera or pissa; other ways to start are not built in",
    ),
    **_all(
        "use_qalora qalora_group_size use_bdlora kasa_config arrow_config velora_config monteclora_config "
        "alora_invocation_tokens layer_replication megatron_config megatron_core",
        _KINDS,
    ),
    **_all(
        "peft_type task_type lora_task_type auto_mapping peft_version revision inference_mode runtime_config",
        _REMOVE + "PEFT's own record of a saved adapter, which a training writes itself",
    ),
    "base_model_name_or_path": "use model_name_or_path",
    "ensure_weight_tying": _REMOVE + "tied weights stay tied",
    "loraplus_lr_embedding": _REMOVE + "embeddings have no adapters; loraplus_lr_ratio is about B",
    # the rows
    **_all("assistant_only_loss completion_only_loss", "use loss_on: answers (the default), last_answer or all"),
    **_all("train_on_inputs train_on_prompt", "use loss_on: answers (the default) or all"),
    "mask_history": "use loss_on: last_answer",
    "train_on_eos": _REMOVE + "the end token of every learned answer is learned",
    "roles_to_train": "use loss_on: answers, which learns what the assistant says",
    **_all("datasets", "use dataset_name"),
    **_all("test_datasets", "use eval_dataset_name"),
    **_all("dataset_kwargs", "use the settings of the rows themselves: data_format, columns, loss_on"),
    "dataset_streaming": _REMOVE + "rows are tokenized into mapped files, so a set may be larger than memory",
    **_all(
        "dataset_prepared_path overwrite_cache",
        _REMOVE + "tokenized rows are cached by content; --no-cache does without",
    ),
    "dataset_dir": "use dataset_name with the path of the file",
    "truncation_mode": "use overlong: truncate, drop or split",
    "shuffle_dataset": _REMOVE + "the rows of each epoch are drawn in a new order, from seed or data_seed",
    **_all(
        "train_sampling_strategy group_by_length length_column_name",
        _REMOVE + "rows of different length need no padding here, so none are grouped",
    ),
    **_all(
        "padding_free pad_to_multiple_of pad_to_sequence_len",
        _REMOVE + "rows are put one after the other without padding",
    ),
    "packing_strategy": "use packing: true; whole rows are packed, best fit first, without attention between them",
    **_all("eval_packing eval_sample_packing", _REMOVE + "evaluations need no packing, since nothing is padded"),
    "neat_packing": "use packing: true, which keeps attention within each row",
    **_all(
        "eos_token pad_token special_tokens",
        _REMOVE + "the tokenizer and the chat template say which tokens end and pad",
    ),
    **_all(
        "label_names remove_unused_columns",
        _REMOVE + "columns that are not used are counted in the ledger of nybble data",
    ),
    **_all(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
        _REMOVE + "batches are made from rows that are tokenized already; dataset_num_proc is about tokenizing",
    ),
    "dataloader_drop_last": _REMOVE + "the last step of an epoch has the rows that are left, each weighing the same",
    # the step
    "label_smoothing_factor": _REMOVE + "the loss is the cross entropy of the learned tokens, without smoothing",
    "average_tokens_across_devices": _REMOVE + "each learned token of a step weighs the same, on any number of devices",
    "optim_target_modules": "use target_modules, or optim_args for an optimizer that projects gradients",
    "auto_find_batch_size": _REMOVE + "the plan splits a batch so that it fits, and the step stays the same",
    "torch_empty_cache_steps": _REMOVE + "memory is reused from step to step; memory_budget limits it",
    "full_determinism": "use deterministic: true",
    # evaluations
    **_all("do_train do_predict", _REMOVE + "the verb says what is done: nybble train, nybble ask"),
    "do_eval": "use eval_fraction; 0 holds no rows out",
    **_all(
        "eval_on_start eval_delay",
        _REMOVE + "held-out rows are evaluated before the training, after it, and every eval_steps",
    ),
    "evals_per_epoch": "use eval_strategy: epoch, or eval_steps as a fraction of all steps",
    "saves_per_epoch": "use save_strategy: epoch, or save_steps as a fraction of all steps",
    **_all(
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics",
        _REMOVE
        + "an evaluation keeps no logits; it gives the loss of each row, and exact match where rows have an answer",
    ),
    "eval_table_size": "use n_samples, the answers that the report shows",
    "eval_max_new_tokens": "use max_new_tokens",
    # checkpoints
    **_all("resume_from_checkpoint auto_resume_from_checkpoints", "use --resume or --auto-resume on the command line"),
    "overwrite_output_dir": "use --overwrite on the command line",
    "save_only_model": _REMOVE + "a checkpoint holds all that a resumed run needs; the adapter is saved at the end",
    "save_on_each_node": _REMOVE + "the first process writes for all machines, into a folder that they share",
    **_all("save_safetensors", _REMOVE + "weights are always saved as safetensors"),
    "enable_jit_checkpoint": _REMOVE + "a signal saves the state at the next micro-batch",
    "ignore_data_skip": _REMOVE + "a resumed run continues at its next row without reading those before",
    "restore_callback_states_from_checkpoint": _REMOVE + "the patience of an early stop is part of every checkpoint",
    # what is told
    **_all(
        "logging_strategy logging_first_step",
        "use logging_steps; the first step is always logged",
    ),
    "logging_nan_inf_filter": "use bad_batch: stop or skip, for a loss that is not a number",
    **_all(
        "log_level log_level_replica log_on_each_node disable_tqdm",
        _REMOVE + "the first process reports, a line every logging_steps",
    ),
    **_all(
        "include_num_input_tokens_seen include_tokens_per_second",
        _REMOVE + "tokens and tokens a second are in every line of events.jsonl and in run.json",
    ),
    "skip_memory_metrics": _REMOVE + "the peak of every phase is in run.json, beside what was planned",
    **_all(
        "project trackio_space_id trackio_bucket_id trackio_static_space_id wandb_project wandb_entity wandb_watch "
        "wandb_log_model mlflow_experiment_name",
        _TENSORBOARD,
    ),
    "wandb_name": "use run_name",
    "plot_loss": _REMOVE + "report.html shows the curve",
    "debug": "use --debug on the command line, which shows where an error comes from",
    **_all(
        "hub_strategy hub_always_push hub_private_repo hub_revision",
        "use push_to_hub and hub_model_id, which upload the adapter at the end; nybble export uploads later",
    ),
    "hub_token": "log in with `hf auth login`; a recipe is kept with the run and must not hold a token",
    # several processes
    **_all(
        "fsdp fsdp_config deepspeed accelerator_config parallelism_config",
        "use distributed: ddp or fsdp, and torchrun to start it",
    ),
    **_all(
        "local_rank ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ignore_bias_buffers",
        _LAUNCHED,
    ),
    # other tools' own
    **_all(
        "model_type tokenizer_type is_llama_derived_model base_model_config",
        _REMOVE + "config.json says what the model is",
    ),
    "tokenizer_config": "use tokenizer_name_or_path",
    "strict": _REMOVE + "an unknown setting is always an error",
    "noisy_embedding_alpha": "use neftune_noise_alpha",
    "cosine_min_lr_ratio": "use lr_scheduler_type: cosine_with_min_lr with lr_scheduler_kwargs: {min_lr_rate: RATIO}",
    "peft_use_dora": "use use_dora",
    "peft_use_rslora": "use use_rslora",
    "loss_weights": "use rpo_alpha for the weight of the chosen answer's supervised loss",
    **_all(
        "ref_model ref_model_adapters ref_model_quantization_bit ref_adapter_name model_adapter_name reference_free "
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ref_model_init_kwargs",
        _REMOVE + "the reference is the model that training starts from, with the adapter of adapter_name_or_path",
    ),
    **_all(
        "f_divergence_type f_alpha_divergence_coef discopop_tau use_weighting dpo_use_weighting dpo_norm_loss "
        "cpo_alpha",
        _REMOVE + "the losses are those of loss_type under dpo, and of ipo, kto, orpo and simpo",
    ),
    "orpo_alpha": "use beta, the weight of orpo's odds ratio",
    "precompute_ref_batch_size": _REMOVE + "the reference is computed in batches of as many tokens as a step",
    "disable_dropout": "use lora_dropout: 0",
    "generate_during_eval": _REMOVE + "answers to held-out prompts are always shown in the report",
    **_all("padding_value label_pad_token_id is_encoder_decoder", _REMOVE + "rows are not padded"),
    "pref_bco_weight": _REMOVE + "objectives are dpo, ipo, kto, orpo and simpo",
    **_all("max_prompt_length max_completion_length", "use max_length, the longest prompt and answer together"),
    **_all("plugins", _REMOVE + "there are no plugins"),
}
