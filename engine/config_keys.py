"""Under which names configs state sizes, and which of them a model's code does not read.

transformers keeps whatever a config.json says, and its caches believe some of it: with
`sliding_window` in the config of a Llama they forget what its masks still show, so that answers
differ with and without a cache. What the code does not read is taken out, and told.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from engine.families import Family

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "n_kv_heads")
VOCABULARY = ("vocab_size", "n_vocab", "padded_vocab_size")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
HEAD_DIM = ("head_dim", "d_kv")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

SIZING: tuple[tuple[str, ...], ...] = (
    LAYERS, HIDDEN, HEADS, KV_HEADS, VOCABULARY, POSITIONS, HEAD_DIM, EXPERTS,
    ("layer_types", "layers_block_type"),
    ("sliding_window",), ("attention_chunk_size",), ("use_sliding_window",),
    ("num_kv_shared_layers",), ("per_layer_config",), ("attention_k_eq_v",),
    ("num_global_key_value_heads",), ("global_head_dim",),
    ("kv_lora_rank",), ("qk_rope_head_dim",), ("qk_nope_head_dim",), ("v_head_dim",),
    ("multi_query",), ("new_decoder_architecture",), ("alibi",), ("attn_logit_softcapping",),
    ("num_experts_per_tok",),
    ("rope_parameters", "rope_scaling"), ("rope_theta", "rotary_emb_base"),
    ("partial_rotary_factor", "rotary_pct", "rotary_dim"),
)  # fmt: skip
"""Names that size a model, those of one thing together."""


TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config")
"""Where a config of several parts keeps the language model."""


def as_taken(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config.json as AutoConfig takes it: Mistral with kinds of layers is Ministral."""
    if config.get("model_type") == "mistral" and "layer_types" in config:
        return {**config, "model_type": "ministral"}
    return config


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model."""
    for name in TEXT_CONFIGS:
        if isinstance(config.get(name), Mapping):
            return text_part(config[name])
    return config


def stray(part: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return what a config states of sizes that the family's code does not read.

    Not what switches nothing on: null, false, 0.
    """
    return {
        name: part[name]
        for names in SIZING
        for name in names
        if part.get(name) and not family.reads(name)
    }


def without(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a config, or of its text part in it, without some of its keys."""
    kept = copy.deepcopy(dict(config))
    part = text_part(kept)
    assert isinstance(part, dict)
    ropes = [part.get(name) for name in ("rope_parameters", "rope_scaling")]
    for where in (part, *(rope for rope in ropes if isinstance(rope, dict))):
        for name in names:
            where.pop(name, None)
    return kept
