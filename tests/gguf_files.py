"""GGUF files of tiny llamas, as the conversion of llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import tiny_model
from tests.plugins.helpers import plain

PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of a llama in transformers, and in llama.cpp."""

Change = Callable[[dict[str, np.ndarray]], object]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head as llama.cpp rotates them: pairs beside each other."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(folder: Path, kind: str, change: Change = lambda tensors: None) -> Path:
    """Write the llama in `folder` as a GGUF file, as llama.cpp's conversion does."""
    import gguf

    model = plain(folder)
    config, tensors = model.config, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module, array = name.removesuffix(".weight"), tensor.numpy()
        part = module.rpartition(".")[2]
        array = interleaved(array, heads[part]) if part in heads else array
        _, _, layer = module.partition("model.layers.")
        number, _, inner = layer.partition(".")
        prefix = f"blk.{number}." if layer else ""
        tensors[f"{prefix}{PARTS[inner or module]}.weight"] = array
    change(tensors)
    file = folder / f"{kind}.gguf"
    writer: Any = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, array in tensors.items():
        wanted: Any = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def contract_words(contract: Any) -> list[str]:
    """Return what a contract's recipe needs beside its options: a folder with a GGUF file."""
    folder = Path("models/gguf").absolute()
    if not (folder / "F32.gguf").exists():
        write_gguf(tiny_model("llama", folder), "F32")
    return [f"model.path={folder}", "model.dtype=float32", "decode.max_new_tokens=5"]
