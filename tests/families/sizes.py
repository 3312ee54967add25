"""The sizes of the tiny models: one table a kind of config, and what single families need on top, with the reason."""

from __future__ import annotations

from typing import Any

VOCAB = 128
HIDDEN = 64
EXPERTS = 8
LAYERS = 3

TEXT: dict[str, Any] = {
    # shape
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    # experts
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "moe_hidden_size": 32,
    "router_hidden_size": 16,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "dense_intermediate_size": 48,
    "prefix_dense_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_nextn_predict_layers": 0,
    # Low enough to clamp these models' activations.
    "swiglu_limit": 1.0,
    # latent attention and its indexers
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "rotary_dim": 8,
    "hc_lowrank": 8,
    "d_rel": 4,
    "rel_extent": 16,
    # windowed and linear attention, state-space layers
    "sliding_window": 8,
    "sliding_window_size": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "gated_norm_rank": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_groups": 2,
    "use_mamba_kernels": False,
}

# Fields whose default None switches a feature off; a number there would switch it on.
KEPT_WHEN_NONE = frozenset(
    {
        "head_dim",
        "moe_latent_size",
        "n_group",
        "prefix_dense_intermediate_size",
        "q_lora_rank",
        "sliding_window",
        "swiglu_limit",
        "topk_group",
        "unpadded_vocab_size",
    }
)

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "hidden_dim": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "depth": 2,
    "downsample_hidden_size": 16,
    "downsample_channels": [32, 32],
    "output_channels": 32,
    "position_embedding_size": 64,
    "projection_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "head_dim": 16,
    "global_head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "posemb_grid_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "deepstack_visual_indexes": [0],
    "n_mel_bins": 16,
    "num_mel_bins": 16,
    "mel_vocab_size": 16,
    "projection_hidden_dim": 32,
    "text_hidden_size": HIDDEN,
    "out_hidden_size": HIDDEN,
    "output_hidden_size": HIDDEN,
    "output_dim": HIDDEN,
}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0}

OF_FAMILY: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 3, "first_k_dense_replace": 1},
    "deepseek_ocr2": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": 8},
    "diffusion_gemma": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 32},
    "doge": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4, "keep_window_size": 256},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    # The sizes of its sliding layers are in no field: they are keyword arguments with defaults of the real model.
    "dots3_note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_moe": {"moe_layer_end_index": LAYERS - 1},
    # Text and vision experts of different widths.
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [32, 16],
        "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
    },
    "gemma4": {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 32},
    "glm4v_moe": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next": {"qk_rope_head_dim": 0, "qk_nope_head_dim": 16, "head_dim": 0, "index_kpool": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2, "head_dim": 16},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4": {"intermediate_size_mlp": 48, "attention_chunk_size": 64, "num_experts_per_tok": 1},
    # 4 of the 12 choices are zero-computation experts.
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 4,
        "moe_topk": 2,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "mixtral": {"head_dim": 16},
    "nllb_moe": {
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    # A limit low enough to clamp, another per layer, and none in the last.
    "step3p7": {
        "sliding_window": 8,
        "share_expert_dim": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 4,
        "swiglu_limits": [None, 0.25, 0.5, None],
        "swiglu_limits_shared": [None, None, 0.5, None],
    },
    "switch_transformers": {
        "d_model": HIDDEN,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Parts of any kind that are None in a fresh config, while the model cannot be built without (transformers 5.17).
NEEDED_PARTS = {"DiffusionGemmaConfig": {"vision_config": "gemma4_vision"}}

OF_CONFIG_CLASS: dict[str, dict[str, Any]] = {
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "DbrxConfig": {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 256,
        "vocab_size": VOCAB,
    },
    "DbrxFFNConfig": {"hidden_size": HIDDEN, "ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    # A canvas as long as the prompt of the tests.
    "DiffusionGemmaConfig": {"canvas_length": 12},
    "Dots3NoteAudioConfig": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "downsample_hidden_size": 16,
        "adapter_input_size": 32,
        "adapter_out_dim": HIDDEN,
    },
    # A vision tower with experts of its own.
    "Dots3NoteVisionConfig": {
        "adapter_in_dim": 32,
        "adapter_out_dim": HIDDEN,
        "moe_intermediate_size": 16,
        "mlp_layer_types": ["dense", "sparse"],
        "per_layer_config": {1: {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}},
    },
    # The tower folds the patch to one vector: prime factors of the patch size decide its width.
    "InklingVisionConfig": {"patch_size": 4, "num_hidden_layers": 4},
    "MiniMaxM3VLConfig": {"projector_hidden_size": 32, "merged_hidden_size": 128},
    "MuseSparkAudioConfig": {
        "num_hidden_layers": 2,
        "patch_sizes": [4, 4],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
    },
    "MuseSparkConfig": {"out_hidden_size": HIDDEN, "projector_hidden_size": 32},
    "Qwen3OmniMoeCode2WavConfig": {"decoder_dim": 64, "codebook_size": 32},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2, "thinker_hidden_size": HIDDEN},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 24},
}
