"""The config of a model in a GGUF file: what config.json says, or what the file's header does.

Without a config.json, what a header says is told in transformers' words; what it leaves open, and
llama.cpp has in its code, is told here by family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.blueprint import sources
from engine.contexts import ModelConfig
from engine.loading import gguf_compare, gguf_rope
from engine.loading.gguf_header import GgufHeader, refused
from engine.loading.gguf_keys import ROWS
from engine.loading.model_json import read_config
from engine.shape import read_shape

Config = dict[str, Any]

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Architecture:
    """What transformers calls a family of llama.cpp's."""

    model_types: tuple[str, ...]
    """A file without a config.json is of the first."""
    more: Callable[[GgufHeader], Config] = lambda header: {}
    """What its config class asks, and no key of the header tells by itself."""


def _has(header: GgufHeader, *names: str) -> bool:
    """Tell whether a layer has one of these tensors."""
    return any(each.endswith(tuple(f".{name}" for name in names)) for each in header.tensors)


def _head_dim(header: GgufHeader) -> int:
    heads = _one(header.get("attention.head_count")) or 1
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
    return {"rope_parameters": {**_scaled(header), "truncate": False}}


def _gemma2(header: GgufHeader) -> Config:
    return {"query_pre_attn_scalar": _gemma_scale(header, 46)}


def _gemma_scale(header: GgufHeader, layers: int) -> int:
    """Return what scores are scaled by, which only the largest of a family has otherwise.

    As llama.cpp has it, src/models/gemma2.cpp and gemma3.cpp: no key says so.
    """
    if header.get("block_count") != layers:
        return _head_dim(header)
    return int(header.get("embedding_length", 0) // (_one(header.get("attention.head_count")) or 1))


def _gemma3(header: GgufHeader) -> Config:
    given = header.get("attention.sliding_window_pattern", 6)
    count = int(header.get("block_count", 0))
    windows = given if isinstance(given, list) else [(n + 1) % given > 0 for n in range(count)]
    full = _scaled(header)
    near = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 10_000.0)}
    return {
        "query_pre_attn_scalar": _gemma_scale(header, 62),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windows],
        "rope_parameters": {"full_attention": full, "sliding_attention": near},
    }


def _falcon(header: GgufHeader) -> Config:
    kv_heads = _one(header.get("attention.head_count_kv"))
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
    "mamba": Architecture(("mamba",)),
    "stablelm": Architecture(("stablelm",), _stablelm),
    "nemotron": Architecture(("nemotron",)),
    "gpt-oss": Architecture(("gpt_oss",), _gpt_oss),
    "lfm2": Architecture(("lfm2",), _lfm2),
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


def verify_model(header: GgufHeader, model_type: str | None) -> None:
    """Raise CheckpointError for a file that is no model, or of a family that cannot be read.

    Args:
        model_type: as config.json has it; None where there is none.
    """
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
    accepted = ARCHITECTURES[name].model_types
    if model_type is not None and model_type not in accepted:
        what = f"model_type is {' or '.join(accepted)} in the file and {model_type} in config.json"
        hint = (
            "config.json is another model's: take that of the checkpoint that the file was made of"
        )
        raise refused(file, what, hint)
    if header.keys.get("general.quantization_version", 2) != 2 and _is_packed(header):
        version = header.keys["general.quantization_version"]
        what = f"{file.name} has blocks of quantization_version {version}; read is version 2"
        raise refused(file, what)


def of_header(header: GgufHeader) -> Config:
    """Return the config that a header describes.

    Raises CheckpointError where it leaves something open.
    """
    one = ARCHITECTURES[header.architecture]
    config: Config = {"model_type": one.model_types[0], **one.more(header)}
    kind = sources.config_class(config["model_type"])
    fields = kind.__dataclass_fields__
    for key, row in ROWS.items():
        name = next((name for name in row.names if name in fields), None)
        value = header.get(key)
        if value is not None and name is not None:
            config.setdefault(name, _one(value))
    if "rope_parameters" in fields:
        config.setdefault("rope_parameters", _scaled(header))
    ids = {name: header.keys.get(f"tokenizer.ggml.{name}_token_id") for name in _IDS}
    ends = sorted({int(each) for name in _ENDS if (each := ids[name]) is not None})
    config |= {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": ids["padding"],
    }
    return config | _dtype(header)


_ENDS = ("eos", "eot", "eom")
_IDS = ("bos", "padding", *_ENDS)


def _one(value: Any) -> Any:
    """Return the value that a key has for all layers, where it has a list of it."""
    if isinstance(value, list):
        return next((each for each in value if each), 0)
    return value


def _scaled(header: GgufHeader) -> Config:
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


def _is_packed(header: GgufHeader) -> bool:
    return any(tensor.kind not in DTYPES for tensor in header.tensors.values())


def _dtype(header: GgufHeader) -> Config:
    """Return the number format of the matrices, where it is a plain one."""
    kinds = [tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1]
    most = max(kinds, key=kinds.count, default="")
    return {"dtype": DTYPES[most]} if most in DTYPES else {}


def described(header: GgufHeader, folder: Path) -> ModelConfig:
    """Return the config of the model in a file: that beside it, or the header's; and notes.

    Raises CheckpointError for what is no model, or of another family than config.json says.
    """
    beside = (folder / "config.json").is_file()
    config = read_config(folder) if beside else {}
    verify_model(header, str(config.get("model_type")) if beside else None)
    config = config or of_header(header)
    more = gguf_rope.adopted(header, read_shape(config))
    config |= more
    told = [*gguf_compare.notes(header, read_shape(config), folder, config)]
    if more and beside:
        told.append(
            f"{header.file.name}: config.json scales no positions, so the file's factors do"
        )
    return ModelConfig(config=config, notes=told)
