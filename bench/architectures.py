"""The published configurations of real MoE models, as their config.json states them, and how to shrink one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from moert.errors import ConfigError

BYTE_TOKENS = 256

_OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 50304,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # OLMoE's shape at 1.7 GB, of which 1.6 GB are experts of 3 MiB: a vocabulary of 50304 would take 0.2 GB more.
    "olmoe-bench": {
        **_OLMOE,
        "eos_token_id": 2,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "vocab_size": 4096,
    },
    # The same bytes as half as many experts of 6 MiB, 4 for a token: what routing recorded from gpt-oss-20b fits.
    "olmoe-bench-32": {
        **_OLMOE,
        "eos_token_id": 2,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 8,
        "vocab_size": 4096,
    },
    "olmoe-1b-7b": _OLMOE,
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
    # The hub's files are MXFP4; without quantization_config these are the bf16 fused tensors transformers holds.
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    },
}


def expert_count_key(config: dict[str, Any]) -> str:
    """The key under which `config` states E."""
    return next(key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)


def configuration(
    arch: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    hidden: int | None = None,
    expert_width: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of `arch`, with the given dimensions in place of the published ones.

    `overrides` are set last, under their own names. Special token ids beyond the vocabulary move to its end, and picks
    per token are at most the experts there are.

    Raises:
        ConfigError: `arch` is unknown, or the result has too small a vocabulary for bytes and special tokens.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"architecture {arch!r} is unknown; there are {', '.join(ARCHITECTURES)}")
    config = deepcopy(ARCHITECTURES[arch])
    width_key = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    sizes = {
        "num_hidden_layers": layers,
        expert_count_key(config): experts,
        "hidden_size": hidden,
        width_key: expert_width,
    }
    config.update({key: value for key, value in sizes.items() if value is not None})
    config.update(overrides or {})

    picks = min(config["num_experts_per_tok"], config[expert_count_key(config)])
    config.update({key: picks for key in ("num_experts_per_tok", "experts_per_token") if key in config})
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    specials = [key for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None]
    if config["vocab_size"] < BYTE_TOKENS + len(specials):
        raise ConfigError(f"vocab_size={config['vocab_size']} must be at least {BYTE_TOKENS + len(specials)}")
    for place, key in enumerate(specials, start=1):
        if config[key] >= config["vocab_size"]:
            config[key] = config["vocab_size"] - place
    return config
