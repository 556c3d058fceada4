"""Tiny random models with a tokenizer, of the families that recipes are tested on.

Two layers, 64 wide: made and saved in a fraction of a second, the same every time. The weights
are spread far wider than a fresh model's, so that greedy decoding does not repeat one token.
"""

from __future__ import annotations

import json
import struct
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.stateful import STATEFUL

VOCABULARY = 320
CONTEXT = 128
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}
_PAIRS = [(a, b) for a, b in product("etaoinsr", repeat=2)][: VOCABULARY - 256 - len(SPECIAL)]

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

_GROUPED: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

_DRAFT = {**_GROUPED, "num_hidden_layers": 1}

_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 16}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **_GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", _GROUPED),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 128}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.3}),
    "gpt2": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", {"multi_query": True}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "falcon-rotary": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("mpt", {"max_seq_len": CONTEXT, "expansion_ratio": 2}),
    "starcoder2": ("starcoder2", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    # Scores are capped (gemma2), learned sinks take part in the softmax (gpt_oss).
    "gemma2": (
        "gemma2",
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": CONTEXT // 4,
            },
        },
    ),
    "mixtral": ("mixtral", {**_GROUPED, **_EXPERTS, "num_local_experts": 4}),
    # Keys and values are kept as one latent vector per token (MLA).
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_EXPERTS,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    # Layers that keep a state instead of keys and values.
    "lfm2": (
        "lfm2",
        {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}

FAMILIES = tuple(_SHAPES)
"""Names that `tiny_config` and `tiny_model` know."""


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Return the config of a tiny model; `overrides` win over its values."""
    model_type, shape = (_SHAPES | STATEFUL).get(family, ("llama", _DRAFT))
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "pad_token_id": SPECIAL["<pad>"],
        "bos_token_id": SPECIAL["<s>"],
        "eos_token_id": SPECIAL["</s>"],
    }
    if family in STATEFUL:  # some have neither heads nor positions
        kind: Any = CONFIG_MAPPING[model_type]
        known = kind.__dataclass_fields__.keys() | kind.attribute_map.keys()
        values = {name: value for name, value in values.items() if name in known}
    return AutoConfig.for_model(model_type, **(values | shape | overrides))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that fills the vocabulary."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, _PAIRS)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_PAIRS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast  # which has no annotations
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    return tokenizer


@torch.no_grad()
def _unsettle(model: Any) -> None:
    """Give biases and norms values of their own, and let decoding neither end nor stand still."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        if "embeddings_layernorm" in name:
            parameter.mul_(0.02)
    # A token's own embedding must not win over what the layers add: tied weights would repeat it.
    if getattr(model.config, "tie_word_embeddings", False):  # Inkling has no such word
        model.get_input_embeddings().weight.mul_(0.02)
    model.get_output_embeddings().weight[SPECIAL["</s>"]] = 0


def tiny_model(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Save a tiny random model of `family` with its tokenizer into `folder`, and return it."""
    config = tiny_config(family, **overrides)
    auto: Any = AutoModelForCausalLM  # which has no annotations
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)  # with 0 and 1, BLOOM and Falcon repeat themselves
        model = auto.from_config(config, dtype=dtype)
        _unsettle(model)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def safetensors_file(folder: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file with any header, true or not, and any data."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return file
