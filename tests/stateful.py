"""Tiny configs of the families whose layers keep a state, beside those of `tests.models`."""

from __future__ import annotations

from typing import Any

_GROUPED: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}

STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    # Attention and Mamba side by side in each layer.
    "falcon_h1": (
        "falcon_h1",
        {
            **_GROUPED,
            **_MAMBA2,
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_expand": 1,
        },
    ),
    # Attention in some layers, a state in the others, or both.
    "bamba": ("bamba", {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1]}),
    "zamba": (
        "zamba",
        {
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
    "jamba": (
        "jamba",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 16,
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_GROUPED,
            **_MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "lfm3": (
        "lfm3",
        {
            **_GROUPED,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["conv", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3_5": ("qwen3_5_text", {**_GROUPED, **_DELTA, "head_dim": 16}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            **_GROUPED,
            **_DELTA,
            **_EXPERTS,
            "vocab_size": 328,  # its tokenizer class adds a token
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen4_exp": (
        "qwen4_exp_text",
        {
            **_GROUPED,
            **_DELTA,
            **_EXPERTS,
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 50,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            **_LATENT,
            **_EXPERTS,
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
    ),
    "minimax": (
        "minimax",
        {
            **_GROUPED,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_GROUPED, **_DELTA, "linear_num_key_heads": 4}),
    "bailing_hybrid": (
        "bailing_hybrid",
        {
            **_LATENT,
            **_EXPERTS,
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "first_k_dense_replace": 1,
        },
    ),
    "zaya": (
        "zaya",
        {
            **_GROUPED,
            "head_dim": 16,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 1,
            "router_hidden_size": 16,
        },
    ),
    "inkling": (
        "inkling_text",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "inkling2": (
        "inkling2_text",
        {
            **_GROUPED,
            **_EXPERTS,
            "unpadded_vocab_size": 320,
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "n_routed_experts": 4,
            "layer_types": ["hybrid_sliding", "hybrid"],
        },
    ),
    # Compressed keys, and a buffer of tokens that are not compressed yet.
    "deepseek_v4": (
        "deepseek_v4",
        {
            **_EXPERTS,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "q_lora_rank": 24,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "partial_rotary_factor": 0.25,
            "mlp_layer_types": ["moe", "moe"],
            "sliding_window": 16,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 64,  # all: of ties, which the rest has, those first in a longer text win
        },
    ),
    # No attention at all.
    "mamba": ("mamba", {"state_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "mamba2": (
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "rwkv": ("rwkv", {"context_length": 128}),
    "xlstm": ("xlstm", {"num_heads": 4, "chunk_size": 16, "autocast_kernel_dtype": "float32"}),
    # Some attention, and a state that lies in the modules themselves.
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 128,
            "attention_window_size": 16,
            "num_key_value_heads": 1,
        },
    ),
}
