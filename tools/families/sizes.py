"""What a field of a config is in a tiny model: by its name, and the few families in which a name is not enough.

Widths are multiples of 64, so that blocks of 64 weights end with rows; heads are 4 of 16; of experts there are 4, of
which 2 answer. A field that is not listed keeps the family's own value.
"""

from __future__ import annotations

from typing import Any

HIDDEN = 64
INTERMEDIATE = 128
HEADS = 4
HEAD_DIM = 16
LAYERS = 2
EXPERTS = 4

_GROUPS: tuple[tuple[int, str], ...] = (
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers layers depth encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_blocks conf_num_hidden_layers num_global_layers
        resampler_depth num_layers_per_stack num_timestamp_prediction_layers""",
    ),
    (
        HIDDEN,
        """hidden_size n_embd d_model emb_dim dim_hidden embedding_dim embedding_size input_embedding_size
        lru_width word_embed_proj_dim output_embedding_size hidden_dim decoder_hidden_size hidden_size_global
        embed_dim attention_hidden_size text_hidden_size vision_hidden_size projection_dim
        projection_hidden_size output_dim out_hidden_size encoder_hidden_size image_text_hidden_size
        adapter_out_dim projector_hidden_size mamba_d_ssm patch_embed_hidden_size moe_hidden_size
        vision_output_dim audio_hidden_size""",
    ),
    (
        INTERMEDIATE,
        """intermediate_size n_inner ffn_dim d_ff dff dim_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        d_inner feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size
        alignment_intermediate_size projection_intermediate_size projection_hidden_dim shared_intermediate_size
        shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size
        share_expert_dim""",
    ),
    (64, "moe_intermediate_size expert_ffn_hidden_size"),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads
        num_encoder_attention_heads decoder_attention_heads num_decoder_attention_heads conf_num_attention_heads
        swa_num_attention_heads num_sliding_attention_heads resampler_heads resampler_n_heads index_n_heads
        linear_num_heads linear_num_value_heads num_query_groups""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads
        num_global_key_value_heads""",
    ),
    (
        HEAD_DIM,
        """head_dim d_kv d_head dim_head attention_head_dim attention_head_size kv_channels v_head_dim swa_head_dim
        qk_nope_head_dim qk_rope_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim
        index_head_dim resampler_dim_head resampler_head_dim query_pre_attn_scalar ssm_state_size state_size
        mamba_d_state""",
    ),
    (8, "rotary_dim laurel_rank adapter_rank gated_norm_rank time_step_rank mamba_dt_rank d_rel"),
    (32, "qk_head_dim"),
    (
        32,
        """kv_lora_rank q_lora_rank o_lora_rank hc_lowrank hidden_size_per_layer_input global_head_dim
        router_hidden_size""",
    ),
    (
        8,
        """sliding_window sliding_window_size attention_chunk_size local_attention attention_window_size chunk_size""",
    ),
    (8, "mamba_chunk_size index_block_size block_size index_topk keep_window_size local_attention_window_len"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts index_topk_blocks"),
    (
        1,
        """first_k_dense_replace num_dense_layers n_shared_experts moe_num_shared_experts n_group topk_group
        num_expert_group""",
    ),
    (1, "moe_layer_start_index max_window_layers num_kv_shared_layers"),
    (LAYERS - 1, "moe_layer_end_index"),
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    (
        512,
        """max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
        context_length""",
    ),
    (28, "image_size crop_size"),
    (14, "patch_size"),
    (2, "insert_layer_id"),
)
SIZES: dict[str, int] = {name: size for size, names in _GROUPS for name in names.split()}

# A value of 0 is a part that the family does not have; these values are such, and stay.
OFF = (0, -1)

# Fields that are None by default, which modeling code takes as numbers.
FILLED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_HALF_MROPE = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}

# What a name does not tell, family by family (`#`: a second shape that checkpoints of the family have).
_ENCODERS = """bert big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm
roc_bert roformer xlm-roberta xlm-roberta-xl"""
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Which layers attend is told by a period or by indices, and by default two layers have no attention.
    "bamba": {"attn_layer_indices": [1], **_MAMBA_2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], **_MAMBA_2},
    "falcon_h1": {**_MAMBA_2, "mamba_d_ssm": 128},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    # Blocks shared by two layers, as wide again as the model is.
    **{
        name: {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "n_mamba_heads": 2 if name == "zamba" else 8,
            "mamba_headdim": 16,
        }
        for name in ("zamba", "zamba2")
    },
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    # Encoders, which are causal models where their config says so.
    **{name: {"is_decoder": True} for name in _ENCODERS.split()},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "cond:step3p7": {"text_config": {"sliding_window": 8}},
    "cond:muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "cond:molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "cond:fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "cond:glm5_next": {"text_config": {"index_kpool": 4}},
    # The sections of a multimodal rotation sum to half of what is rotated of a head; their sizes stand in the code.
    "qwen3_5_text": {
        "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]},
        "linear_num_value_heads": 4,
    },
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "cond:qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "cond:paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "cond:cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}},
    "cond:ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]}}},
    **{
        f"cond:{name}": {"text_config": {"rope_parameters": {**_HALF_MROPE, "mrope_section": sections}}}
        for name, sections in (
            ("glm46v", [2, 1, 1]),
            ("glm4v", [2, 1, 1]),
            ("glm_ocr", [2, 1, 1]),
            ("glmga", [2, 1, 1]),
            ("glm4v_moe", [2, 1, 1]),
        )
    },
    # As checkpoints since version 0.2 are; the first had windows.
    "mistral": {"sliding_window": None},
    "mistral#window": {},
    # One layer of full attention in so many: the order in which every checkpoint of the family has them.
    **{
        name: {"num_hidden_layers": period, "layer_types": ["sliding_attention"] * (period - 1) + ["full_attention"]}
        for name, period in (("gemma3_text", 6), ("cohere2", 4))
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    # Layers of both kinds that make keys and values, before those that borrow them.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": 128,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gemma4_text#shared": {
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_double_wide_mlp": True,
    },
    "gemma4_text#moe": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE}},
    # Sizes that the class leaves open or checks against each other.
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "cond:nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "cond:qwen2_5_omni_thinker": {"vision_start_token_id": 511},
    "cond:qwen3_omni_moe_thinker": {"vision_start_token_id": 511},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "cond:dots3_note": {"vision_config": {"adapter_in_dim": 64}, "audio_config": {"adapter_input_size": 64}},
}

# Families without a tiny model, and why.
EXCLUDED: dict[str, str] = {
    "gemma4_assistant": "a draft for another model's cache",
    "gemma4_unified_assistant": "a draft for another model's cache",
    "cond:vision-encoder-decoder": "a pair of any two models",
    "cond:fast_vlm": "its tower needs timm",
    "cond:gemma3n": "its tower needs timm",
    "cond:perception_lm": "its tower needs timm",
    "cond:diffusion_gemma": "a diffusion model",
    "musicgen": "a model of sound, which is part of a wrapper",
    "musicgen_melody": "a model of sound, which is part of a wrapper",
    "cond:qwen2_5_omni": "speaks as well; its language model is cond:qwen2_5_omni_thinker",
    "cond:qwen3_omni_moe": "speaks as well; its language model is cond:qwen3_omni_moe_thinker",
}
