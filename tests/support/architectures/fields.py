"""The values that make a model tiny, field by field, and what single architectures need beyond them."""

from typing import Any

VOCAB = 260
"""Tokens of the tokenizer that every tiny model is saved with: four special ones, and all bytes."""
DEPTH = 4
MAX_LENGTH = 128

LOGITS: dict[str, Any] = {
    **dict.fromkeys(("logit_scale", "lm_head_multiplier", "logits_scaling", "logits_mup_width_multiplier"), 0.5),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 3.0),
}  # fmt: skip
"""Fields that change logits, with values whose effect is seen. Only where they have a value by default."""
SIZES: dict[str, Any] = {
    # width
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim", "attention_hidden_size",
         "embedding_size", "input_embedding_size", "output_embedding_size", "lru_width", "router_hidden_size",
         "hidden_size_global", "pronunciation_embed_dim", "shape_embed_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "dff", "ffn_hidden_size",
         "d_inner", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
         "expert_ffn_hidden_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "ple_embed_dim"), 8),
    # depth
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks",
         "num_encoder_layers", "num_decoder_layers", "num_layers_per_stack"), DEPTH),
    # attention; an index has many heads, because the scores of few would often be equal (0)
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads", "swa_num_attention_heads",
         "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_query_groups",
         "mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(
        ("head_dim", "d_head", "dim_head", "kv_channels", "attention_head_size", "attention_head_dim", "swa_head_dim",
         "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim", "v_head_dim", "mamba_d_head",
         "mamba_head_dim", "mamba_headdim", "global_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank", "hc_lowrank",
                     "gated_norm_rank", "time_step_rank", "mamba_dt_rank"), 8),
    "index_n_heads": 32, "index_topk": 8, "index_block_size": 4, "index_topk_blocks": 2,
    **dict.fromkeys(("is_decoder", "causal"), True),
    # positions
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
                     "max_target_positions", "max_source_positions", "context_length"), MAX_LENGTH),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention",
                     "attention_chunk_size", "keep_window_size"), 8),
    # vocabulary, logits
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **LOGITS, "dim_model_base": 16,
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group",
                     "num_expert_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    # state spaces
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_num_heads", "chunk_size",
                     "mamba_chunk_size"), 8),
    "mamba_d_ssm": 64, "attn_layer_period": 2, "attn_layer_offset": 1,
    # parts for images and sound
    "image_size": 16, "patch_size": 8, "depth": 1, "num_mel_bins": 8,
}  # fmt: skip
"""Fields of config classes. Wherever a class has such a field, its tiny config has this value."""

_BOTH: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"] * 2}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "num_key_value_heads": 4,
}  # fmt: skip
_WIDE: dict[str, Any] = {f"swa_{key}": 8 for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}

OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": _BOTH,
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "dots3_note_text": _WIDE | {"swa_num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_head_dim": 16, "head_dim": 16},
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_unified_vision": {"mm_embed_dim": 8, "mm_posemb_size": 8, "output_proj_dims": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "laguna": _BOTH,
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"layer_types": None},
    "mamba2": {"num_heads": 8},
    "mellum": _BOTH,
    "ministral": _BOTH,
    "mllama_text_model": {"cross_attention_layers": [1]},
    "phi4_multimodal_audio": {"nemo_conv_channels": 8, "bias_max_distance": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "hash_seed": 0,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID | {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": _HYBRID | {"intermediate_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Fields of single architectures (model_type) whose value in a tiny config differs from SIZES, or is not there."""

_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, no decoder": ("bert", {"is_decoder": False}),
    "bert-generation, no decoder": ("bert-generation", {"is_decoder": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "llama, dynamic rope": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}}),
    "mpt, no alibi": ("mpt", {"attn_config": {"alibi": False}}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "phi3, longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "qwen2, sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "xlm, not causal": ("xlm", {"causal": False}),
}  # fmt: skip
"""Further models, by what distinguishes them: their model_type, and fields."""

NOT_BUILT: dict[str, str] = {
    "gemma3n": "needs the package timm",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, whose keys and values it needs"),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "transformers gives its class the config of the whole, where it takes the decoder's"),
}  # fmt: skip
"""Architectures that are not built, and why."""
