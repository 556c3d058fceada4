"""What the keys of a GGUF header mean, in the words of transformers' configs; no torch.

A key that says how the model computes is held against the config: equal, or refused. `ROWS` has
those that have a word in configs. Where the config has no word for it, only a value that stands
for "nothing of that" passes. A key that nobody knows is told; one about the file's origin is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from engine.config_keys import HEADS, HIDDEN, KV_HEADS, LAYERS, POSITIONS, VOCABULARY
from engine.loading.gguf_families import windows
from engine.loading.gguf_header import GgufHeader
from engine.loading.gguf_known import Known
from engine.positions import rotary
from engine.shape import WITHOUT_KEYS, ModelShape

SAME = 1e-5
"""Relative difference of numbers that are the same: a header has them in 32 bits."""

EPSILON = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
EXPERTS = ("num_local_experts", "num_experts")
INNER = ("intermediate_size", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True)
class Row:
    """What a key is called in configs, and how the config's value of it is found."""

    names: tuple[str, ...]
    """Its words, of which a config has one."""
    read: Callable[[Known], Any] | None = None
    """Returns the config's value, None where it has none; the first of `names` unless given."""

    def value(self, known: Known) -> Any:
        """Return what the config says."""
        return known.get(*self.names) if self.read is None else self.read(known)


def _feed_forward(known: Known) -> Any:
    if not known.shape.heads:
        return 0  # llama.cpp writes it of Mamba, too, which has none
    inner = known.get(*INNER, default=4 * known.shape.hidden_size)
    if known.get("block_auto_adjust_ff_dim"):  # LFM2, modeling_lfm2.py, Lfm2MLP
        multiple = known.get("block_multiple_of")
        inner = int(known.get("block_ffn_dim_multiplier", default=1.0) * int(2 * inner / 3))
        inner = multiple * -(-inner // multiple)
    return inner


def _kv_heads(known: Known) -> Any:
    each = [0 if kind in WITHOUT_KEYS else known.shape.kv_heads for kind in known.shape.layer_types]
    return each if len(set(each)) > 1 else known.shape.kv_heads


def _scaling(known: Known) -> str:
    kind = rotary.kind_of(known.rope)
    # Llama 3 and longrope are kept as tensors, and go by no name in the header, or by this one.
    stated = known.header.get("rope.scaling.type")
    return "none" if kind in ("default", "llama3") or (kind == "longrope" != stated) else kind


def _original(known: Known) -> Any:
    name = "original_max_position_embeddings"
    return known.rope.get(name) or known.get(name, *POSITIONS)


def attention_factor(known: Known) -> float:
    """Return what cosines and sines are multiplied by (modeling_rope_utils.py)."""
    rope, kind = known.rope, rotary.kind_of(known.rope)
    original, longest = _original(known), known.get(*POSITIONS)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope.get("factor") or (longest / original if original and longest else 1.0)
    if kind == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0  # llama.cpp multiplies that of YaRN, which both compute, by its own


def _pattern(known: Known) -> Any:
    stated = known.header.get("attention.sliding_window_pattern")
    same_windows = windows(stated, known.shape.layers) == known.windows
    return stated if same_windows else known.windows


def _gating(known: Known) -> Any:
    if known.get(*EXPERTS) is None:
        return None
    return {"softmax": 1, "sigmoid": 2}.get(known.get("scoring_func", default="softmax"))


def _layout(known: Known) -> str:
    return {"llama": "Meta AI original pth", "falcon": "jploski"}.get(known.header.architecture, "")


_HEAD_DIM = Row(("head_dim",), lambda known: known.shape.head_dim)
_ROTATED = Row(("rotary dimensions",), lambda known: known.shape.rotary_dim)
_WINDOW = Row(("sliding_window",), lambda known: known.shape.sliding_window or 0)


def _rope(name: str, default: Any = None, kind: str = "") -> Row:
    """Return the row of a parameter of rotary positions; one that only a kind of scaling has."""

    def read(known: Known) -> Any:
        other = kind and rotary.kind_of(known.rope) != kind
        return None if other else known.rope.get(name, default)

    return Row((f"rope_parameters.{name}",), read)


ROWS: Mapping[str, Row] = {
    "vocab_size": Row(VOCABULARY),
    "context_length": Row(POSITIONS),
    "embedding_length": Row(HIDDEN),
    "block_count": Row(LAYERS),
    "feed_forward_length": Row(INNER, _feed_forward),
    "use_parallel_residual": Row(("use_parallel_residual",)),
    "tensor_data_layout": Row(("layout",), _layout),
    "attention.head_count": Row(HEADS, lambda known: known.shape.heads),
    "attention.head_count_kv": Row(KV_HEADS, _kv_heads),
    "attention.key_length": _HEAD_DIM,
    "attention.value_length": _HEAD_DIM,
    "attention.layer_norm_rms_epsilon": Row(EPSILON),
    "attention.layer_norm_epsilon": Row(EPSILON),
    "attention.causal": Row(("causal",), lambda known: True),
    "attention.scale": Row(
        ("attention scale",),
        lambda known: known.get("query_pre_attn_scalar", default=known.shape.head_dim) ** -0.5,
    ),
    "attention.max_alibi_bias": Row(
        ("alibi_bias_max",), lambda known: 8.0 if known.shape.position == "alibi" else None
    ),
    "attention.sliding_window": _WINDOW,
    "attention.sliding_window_pattern": Row(("layer_types",), _pattern),
    "attn_logit_softcapping": Row(("attn_logit_softcapping",)),
    "final_logit_softcapping": Row(("final_logit_softcapping",)),
    "logit_scale": Row(("logit_scale",), lambda known: known.get("logit_scale", default=1.0)),
    "rope.dimension_count": _ROTATED,
    "rope.dimension_count_swa": _ROTATED,
    "rope.freq_base": _rope("rope_theta", 10_000.0),
    "rope.freq_base_swa": Row(
        ("rope_parameters.rope_theta",), lambda known: known.window_rope.get("rope_theta")
    ),
    "rope.scaling.type": Row(("rope_parameters.rope_type",), _scaling),
    "rope.scaling.factor": _rope("factor", 1.0),
    "rope.scale_linear": _rope("factor", kind="linear"),
    "rope.scaling.original_context_length": Row(("original_max_position_embeddings",), _original),
    "rope.scaling.attn_factor": Row(("attention_factor",), attention_factor),
    "rope.scaling.yarn_attn_factor": Row(("attention_factor",), attention_factor),
    "rope.scaling.yarn_ext_factor": Row(
        ("extrapolation",), lambda known: float(rotary.kind_of(known.rope) == "yarn")
    ),
    "rope.scaling.yarn_beta_fast": _rope("beta_fast", 32.0, "yarn"),
    "rope.scaling.yarn_beta_slow": _rope("beta_slow", 1.0, "yarn"),
    "expert_count": Row(EXPERTS),
    "expert_used_count": Row(("num_experts_per_tok",)),
    "expert_feed_forward_length": Row(("moe_intermediate_size", "intermediate_size")),
    "expert_shared_feed_forward_length": Row(("shared_expert_intermediate_size",)),
    "expert_weights_norm": Row(("norm_topk_prob",)),
    "expert_weights_scale": Row(
        ("routed_scaling_factor",), lambda known: known.get("routed_scaling_factor", default=1.0)
    ),
    "expert_gating_func": Row(("scoring_func",), _gating),
    "ssm.conv_kernel": Row(("conv_kernel",)),
    "ssm.state_size": Row(("state_size",)),
    "ssm.inner_size": Row(("intermediate_size",)),
    "ssm.time_step_rank": Row(("time_step_rank",)),
    "shortconv.l_cache": Row(("conv_L_cache",)),
}
"""Key, without its architecture → what configs call it."""

UNLIMITED = "context_length"
"""A limit, which says nothing of how a model without one computes: told, not refused."""

_ORIGIN = re.compile(
    r"general\.(name|author|version|organization|finetune|basename|description|quantized_by|"
    r"size_label|license|url|doi|uuid|repo_url|source|base_model|datasets?|tags|languages|sampling|"
    r"file_type|architecture|alignment|type|quantization_version)\b|split\.|quantize\.imatrix\.|"
    r"tokenizer\.|[^.]+\.rope\.scaling\.finetuned\Z"
)
"""Keys of a file's origin, of how to sample, and what the reader and the tokenizer judge."""


def differences(header: GgufHeader, shape: ModelShape, config: str) -> Iterator[str]:
    """Yield what the header says of how the model computes, and `config` says otherwise."""
    known = Known(header, shape)
    for key, value in _computing(header):
        row = ROWS.get(key)
        there = None if row is None else row.value(known)
        if there is None and (not _says_something(value) or key == UNLIMITED):
            continue
        if there is None:
            yield f"{key} is {shown(value)} in the file, and {shape.model_type} has no such thing"
        elif row is not None and not same(value, there):
            name = known.word(row.names)
            yield f"{name} is {shown(value)} in the file and {shown(there)} in {config}"


def unused(header: GgufHeader, shape: ModelShape) -> list[str]:
    """Return the keys of a header that nobody knows, each with its value."""
    known = {f"{header.architecture}.{key}" for key, _ in _computing(header)}
    if Known(header, shape).get(*POSITIONS) is None:
        known.discard(f"{header.architecture}.{UNLIMITED}")
    return [
        f"{name}={shown(value)}"
        for name, value in header.keys.items()
        if name not in known and not _ORIGIN.match(name)
    ]


def _computing(header: GgufHeader) -> Iterator[tuple[str, Any]]:
    """Yield the keys of the architecture that llama.cpp or the rows above know."""
    prefix = f"{header.architecture}."
    for name, value in header.keys.items():
        key = name.removeprefix(prefix)
        ours = name.startswith(prefix) and not _ORIGIN.match(name)
        if ours and (key in ROWS or key in _known_to_llama()):
            yield key, value


@cache
def _known_to_llama() -> frozenset[str]:
    """Return the keys of architectures that the package `gguf` names."""
    from gguf import Keys

    groups = [group for group in vars(Keys).values() if isinstance(group, type)]
    groups += [
        inner for group in groups for inner in vars(group).values() if isinstance(inner, type)
    ]
    names = (name for group in groups for name in vars(group).values() if isinstance(name, str))
    return frozenset(name.removeprefix("{arch}.") for name in names if name.startswith("{arch}."))


def same(stated: Any, there: Any) -> bool:
    """Tell whether two values are the same; a list of equal ones is that one."""
    if isinstance(stated, list) and not isinstance(there, list):
        return bool(stated) and all(same(each, there) for each in stated)
    if isinstance(stated, list):
        return len(stated) == len(there) and all(map(same, stated, there))
    if not isinstance(stated, float) and not isinstance(there, float):
        return bool(stated == there)
    if isinstance(stated, str) or isinstance(there, str | list):
        return False
    return math.isclose(stated, there, rel_tol=SAME)


def _says_something(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value) and value != "none"


def shown(value: Any) -> str:
    """Return a value of a header as messages have it."""
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        return shown(value[0])
    return f"{value:.7g}" if isinstance(value, float) else str(value)
