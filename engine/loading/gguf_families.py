"""What transformers calls the architectures of llama.cpp, and what only its code says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.loading.gguf_header import GgufHeader, refused

Config = dict[str, Any]

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Kinds that are no blocks → number format."""


@dataclass(frozen=True)
class Architecture:
    """What transformers calls a family of llama.cpp's."""

    model_types: tuple[str, ...]
    """A file without a config.json is of the first."""
    more: Callable[[GgufHeader], Config] = lambda header: {}
    """What its config class asks, and no key of the header tells by itself."""
    required: tuple[str, ...] = ()
    """Keys that its header must have, beside those of all."""


def _has(header: GgufHeader, *names: str) -> bool:
    """Tell whether a layer has one of these tensors."""
    return any(each.endswith(tuple(f".{name}" for name in names)) for each in header.tensors)


def _head_dim(header: GgufHeader) -> int:
    heads = for_all_layers(header.get("attention.head_count")) or 1
    return int(header.get("attention.key_length") or header.get("embedding_length", 0) // heads)


def _llama(header: GgufHeader) -> Config:
    experts = {"model_type": "mixtral"} if header.get("expert_count") else {}
    return {
        "attention_bias": _has(header, "attn_q.bias"),
        "mlp_bias": _has(header, "ffn_up.bias"),
        "head_dim": _head_dim(header),
        **experts,
    }


def _qwen2_moe(header: GgufHeader) -> Config:
    shared = header.tensors.get("blk.0.ffn_gate_shexp.weight")
    wide = header.get("expert_feed_forward_length")
    experts = header.tensors.get("blk.0.ffn_gate_exps.weight")
    return {
        **({"shared_expert_intermediate_size": shared.shape[0]} if shared else {}),
        **({"moe_intermediate_size": experts.shape[1]} if experts and not wide else {}),
    }


def _qwen3_moe(header: GgufHeader) -> Config:
    bias = _has(header, "attn_q.bias")
    return {"norm_topk_prob": True, "attention_bias": bias, "head_dim": _head_dim(header)}


def _gpt_oss(header: GgufHeader) -> Config:
    return {"rope_parameters": {**scaled_rope(header), "truncate": False}}


def _gemma2(header: GgufHeader) -> Config:
    return {"query_pre_attn_scalar": _gemma_scale(header, 46)}


def _gemma_scale(header: GgufHeader, layers: int) -> int:
    """Return what scores are scaled by, which only the largest of a family has otherwise.

    As llama.cpp has it, src/models/gemma2.cpp and gemma3.cpp: no key says so.
    """
    if header.get("block_count") != layers:
        return _head_dim(header)
    return int(
        header.get("embedding_length", 0)
        // (for_all_layers(header.get("attention.head_count")) or 1)
    )


def _gemma3(header: GgufHeader) -> Config:
    # As llama.cpp has it, src/models/gemma3.cpp: every sixth layer sees all, if there are windows.
    given = header.get("attention.sliding_window_pattern", 6)
    given = given if header.get("attention.sliding_window") else 1
    near_sighted = windows(given, header.get("block_count"))
    full = scaled_rope(header)
    near = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 10_000.0)}
    return {
        "query_pre_attn_scalar": _gemma_scale(header, 62),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in near_sighted],
        "rope_parameters": {"full_attention": full, "sliding_attention": near},
    }


def _falcon(header: GgufHeader) -> Config:
    kv_heads = for_all_layers(header.get("attention.head_count_kv"))
    two = _has(header, "attn_norm_2.weight")
    new = two or (kv_heads or 1) > 1
    return {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
        "multi_query": not new,
        "num_kv_heads": kv_heads,
        "bias": _has(header, "attn_qkv.bias"),
    }


def _stablelm(header: GgufHeader) -> Config:
    return {
        "use_qkv_bias": _has(header, "attn_q.bias"),
        "use_parallel_residual": not _has(header, "ffn_norm.weight"),
    }


def _lfm2(header: GgufHeader) -> Config:
    heads = header.get("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * int(header.get("block_count", 0))
    return {
        "layer_types": ["full_attention" if each else "conv" for each in heads],
        "num_key_value_heads": max(heads, default=0),
        "block_auto_adjust_ff_dim": False,
        "conv_bias": _has(header, "shortconv.in_proj.bias"),
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(("llama", "mistral", "mixtral"), _llama),
    "qwen2": Architecture(("qwen2",)),
    "qwen2moe": Architecture(("qwen2_moe",), _qwen2_moe),
    "qwen3": Architecture(("qwen3",), lambda h: {"attention_bias": _has(h, "attn_q.bias")}),
    "qwen3moe": Architecture(("qwen3_moe",), _qwen3_moe),
    "phi3": Architecture(("phi3",)),
    "gemma": Architecture(("gemma",)),
    "gemma2": Architecture(("gemma2",), _gemma2),
    "gemma3": Architecture(("gemma3_text",), _gemma3),
    "starcoder2": Architecture(
        ("starcoder2",), lambda h: {"use_bias": _has(h, "attn_q.bias"), "sliding_window": None}
    ),
    "falcon": Architecture(("falcon",), _falcon),
    "gpt2": Architecture(("gpt2",)),
    "bloom": Architecture(("bloom",)),
    "mamba": Architecture(
        ("mamba",), required=("ssm.conv_kernel", "ssm.state_size", "ssm.time_step_rank")
    ),
    "stablelm": Architecture(("stablelm",), _stablelm),
    "nemotron": Architecture(("nemotron",)),
    "gpt-oss": Architecture(("gpt_oss",), _gpt_oss, ("attention.sliding_window",)),
    "lfm2": Architecture(("lfm2",), _lfm2, ("attention.head_count_kv", "shortconv.l_cache")),
}
"""llama.cpp's word → what it is in transformers; each was held against the original weights."""

OTHERS = {
    "clip": "the vision or audio part of a model, for llama.cpp's multimodal tools",
    "t5": "an encoder and decoder, which continues no text",
    "t5encoder": "an encoder, which continues no text",
    **dict.fromkeys(
        ("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2",
         "jina-bert-v3", "eurobert", "gemma-embedding", "llama-embed"),
        "an encoder, which continues no text",
    ),
}  # fmt: skip
TYPES = {
    "adapter": "a LoRA adapter, which changes a model and is none",
    "mmproj": OTHERS["clip"],
    "imatrix": "an importance matrix, for quantizing a model",
}
"""Values of general.type that are no model."""


def verify_model(header: GgufHeader) -> None:
    """Raise CheckpointError for a file that is no model, or of a family that cannot be read."""
    file, name, kind = header.file, header.architecture, header.keys.get("general.type", "model")
    what = TYPES.get(kind) or OTHERS.get(name)
    if what is None and kind != "model":
        what = f"a '{kind}' (general.type)"
    if what:
        base = header.keys.get("general.base_model.0.name")
        of = f" ({name}{f', of {base}' if base else ''})" if kind == "adapter" else ""
        hint = "name the file of the model itself: load.file=FILE.gguf"
        raise refused(file, f"{file.name} is {what}{of}", hint, "not-a-model")
    if not header.tensors:
        what = f"{file.name} has no tensors: a vocabulary alone"
        raise refused(file, what, "name the file of the model: load.file=FILE.gguf", "not-a-model")
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        what = f"files of the architecture '{name}' cannot be read; those of these can: {known}"
        raise refused(file, what, "load=transformers, with the original checkpoint", "family")
    if header.keys.get("general.quantization_version", 2) != 2 and _is_packed(header):
        version = header.keys["general.quantization_version"]
        what = f"{file.name} has blocks of quantization_version {version}; read is version 2"
        raise refused(file, what)


def _is_packed(header: GgufHeader) -> bool:
    return any(tensor.kind not in PLAIN for tensor in header.tensors.values())


def for_all_layers(value: Any) -> Any:
    """Return the value that a key has for all layers, where it has a list of it."""
    if isinstance(value, list):
        return next((each for each in value if each), 0)
    return value


def windows(pattern: Any, layers: int) -> list[bool]:
    """Tell of each layer whether a pattern gives it a window: every so manieth layer has none.

    As llama.cpp has it (src/llama-hparams.cpp): 0 gives one to all layers, 1 to none.
    """
    if isinstance(pattern, list):
        return [bool(each) for each in pattern]
    return [pattern == 0 or (layer + 1) % pattern > 0 for layer in range(layers)]


def scaled_rope(header: GgufHeader) -> Config:
    """Return the rotary parameters that the keys of a header describe."""
    kind = header.get("rope.scaling.type") or "none"
    rope: Config = {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": float(header.get("rope.freq_base", 10_000.0)),
    }
    rotated, wide = header.get("rope.dimension_count"), _head_dim(header)
    if rotated and rotated != wide:
        rope["partial_rotary_factor"] = rotated / wide
    if kind != "none":
        named = {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        values = {name: header.get(f"rope.scaling.{key}") for key, name in named.items()}
        rope |= {name: value for name, value in values.items() if value is not None}
    return rope
