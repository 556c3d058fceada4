"""GGUF files of tiny models, as the conversion of llama.cpp writes them (its conversion/*.py)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.models import CONTEXT, SPECIAL, _unsettle, tiny_model, tiny_tokenizer
from tests.plugins.helpers import plain

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], object]

TOKENS = 336
"""More rows than the tokenizer has tokens: some families' classes add one."""

_GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = [1.0 + place / 2 for place in range(8)]
SHORT = [1.0 + place / 8 for place in range(8)]
_LONGROPE = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT}


@dataclass(frozen=True)
class Case:
    """A family, with values that are not its defaults wherever a header can say them."""

    model_type: str
    architecture: str
    values: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case(
        "llama",
        "llama",
        {**_GROUPED, "rms_norm_eps": 1e-3, "attention_bias": True, "head_dim": 32},
    ),
    "llama-tied": Case("llama", "llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama-3.1": Case(
        "llama",
        "llama",
        {**_GROUPED, "rope_parameters": _LLAMA3, "max_position_embeddings": 131072},
    ),
    "llama-yarn": Case(
        "llama",
        "llama",
        {
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": Case("mistral", "llama", {**_GROUPED, "sliding_window": None}),
    "mixtral": Case("mixtral", "llama", {**_GROUPED, "num_local_experts": 4}),
    "qwen2": Case("qwen2", "qwen2", {**_GROUPED, "rms_norm_eps": 1e-3}),
    "qwen2moe": Case(
        "qwen2_moe",
        "qwen2moe",
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96},
    ),
    "qwen3": Case("qwen3", "qwen3", {**_GROUPED, "head_dim": 32}),
    "qwen3moe": Case(
        "qwen3_moe",
        "qwen3moe",
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "head_dim": 32, "norm_topk_prob": True},
    ),
    "phi3": Case("phi3", "phi3", {**_GROUPED, "sliding_window": 16}),
    "phi3-longrope": Case(
        "phi3",
        "phi3",
        {**_GROUPED, "original_max_position_embeddings": 64, "rope_parameters": _LONGROPE},
    ),
    "gemma": Case("gemma", "gemma", {**_GROUPED, "head_dim": 32}),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {
            **_GROUPED,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        "gemma3",
        {
            **_GROUPED,
            "num_hidden_layers": 7,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "starcoder2": Case("starcoder2", "starcoder2", {**_GROUPED, "norm_epsilon": 1e-3}),
    "falcon-7b": Case("falcon", "falcon", {"multi_query": True, "alibi": False}),
    "falcon-40b": Case("falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": Case(
        "falcon",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "gpt2": Case("gpt2", "gpt2", {"layer_norm_epsilon": 1e-3}),
    "bloom": Case("bloom", "bloom"),
    "mamba": Case("mamba", "mamba", {"state_size": 8}),
    "stablelm": Case("stablelm", "stablelm", {**_GROUPED, "use_qkv_bias": True}),
    "stablelm-12b": Case("stablelm", "stablelm", {**_GROUPED, "use_parallel_residual": True}),
    "nemotron": Case("nemotron", "nemotron", {**_GROUPED, "norm_eps": 1e-3}),
    "gpt-oss": Case(
        "gpt_oss",
        "gpt-oss",
        {
            **_GROUPED,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
            },
        },
    ),
    "lfm2": Case(
        "lfm2",
        "lfm2",
        {
            **_GROUPED,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "norm_eps": 1e-3,
        },
    ),
}  # fmt: skip
"""A family of each kind that is read."""


def make_model(name: str, folder: Path) -> Any:
    """Save a tiny model of a case, with its tokenizer, and return it."""
    case = CASES[name]
    sizes = {"vocab_size": TOKENS, "hidden_size": 64, "num_hidden_layers": 2}
    if case.model_type != "mamba":
        sizes |= {"num_attention_heads": 4}
    if case.model_type not in ("mamba", "bloom"):
        sizes |= {"max_position_embeddings": CONTEXT}
    ids = {f"{word}_token_id": SPECIAL[token] for word, token in _ENDS.items()}
    given = {"initializer_range": 0.3, **sizes, **ids, **case.values}
    config = AutoConfig.for_model(case.model_type, **given)
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = auto.from_config(config, dtype=torch.float32)
        _unsettle(model)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()


_ENDS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}


def _kind(architecture: str) -> Any:
    import gguf

    return next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head as llama.cpp rotates them: pairs beside each other."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _parts(name: str, array: np.ndarray, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a weight as the conversion names its parts."""
    head, _, leaf = name.rpartition(".")
    if ".experts" not in name:
        yield (f"{name}.weight" if leaf == "sinks" else name), array
        return
    word, ending = leaf.removesuffix("_bias"), "bias" if leaf.endswith("_bias") else "weight"
    in_turns = architecture == "gpt-oss"
    if in_turns and ending == "weight":
        array = array.swapaxes(-1, -2)
    if word == "down_proj":
        yield f"{head}.down_proj.{ending}", array
        return
    both = (array[:, ::2], array[:, 1::2]) if in_turns else np.split(array, 2, axis=1)
    for part, half in zip(("gate_proj", "up_proj"), both, strict=True):
        yield f"{head}.{part}.{ending}", half


def _changed(name: str, array: np.ndarray, config: Any, architecture: str) -> np.ndarray:
    """Return a weight as the conversion changes it."""
    heads, wide = getattr(config, "num_attention_heads", 0), config.hidden_size
    match architecture:
        case "llama" if ".q_proj." in name:
            return interleaved(array, heads)
        case "llama" if ".k_proj." in name:
            return interleaved(array, config.num_key_value_heads)
        case "gemma" | "gemma2" | "gemma3" | "nemotron" if name.endswith("norm.weight"):
            return array + 1
        case "gpt2" if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            return array.T
        case "bloom" if ".query_key_value." in name:
            parts = array.reshape(heads, 3, wide // heads, *array.shape[1:])
            return np.concatenate([parts[:, n].reshape(wide, *array.shape[1:]) for n in range(3)])
        case "falcon" if ".query_key_value." in name:
            groups = config.num_kv_heads if config.new_decoder_architecture else 1
            parts = array.reshape(groups, heads // groups + 2, wide // heads, wide)
            rows = (parts[:, :-2], parts[:, [-2]], parts[:, [-1]])
            return np.concatenate([each.reshape(-1, wide) for each in rows])
        case "mamba" if name.endswith(".A_log"):
            negated: np.ndarray = -np.exp(array)
            return negated
        case "mamba" | "lfm2" if ".conv1d.weight" in name or "conv.conv" in name:
            return array.squeeze(1)
    return array


def tensors_of(model: Any, architecture: str) -> Tensors:
    """Return the tensors of a model by their GGUF names."""
    import gguf

    config, found = model.config, {}
    table = gguf.get_tensor_name_map(_kind(architecture), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        inner = name.removeprefix("transformer.") if architecture == "bloom" else name
        array = _changed(inner, tensor.float().numpy(), config, architecture)
        for part, values in _parts(inner, array, architecture):
            gguf_name = table.get_name(part, (".weight", ".bias"))
            assert gguf_name, part
            found[gguf_name] = np.ascontiguousarray(values)
    return found | _tables(config)


def _tables(config: Any) -> Tensors:
    """Return the factors of rotary positions, which llama.cpp keeps as tensors."""
    rope = getattr(config, "rope_parameters", None) or {}
    factors: dict[str, list[float]] = {}
    if rope.get("rope_type") == "longrope":
        factors = {"long": rope["long_factor"], "short": rope["short_factor"]}
        factors = {f"rope_factors_{name}.weight": each for name, each in factors.items()}
    elif rope.get("rope_type") == "llama3":
        factors = {"rope_freqs.weight": llama3_factors(rope, config.head_dim)}
    return {name: np.array(each, np.float32) for name, each in factors.items()}


def llama3_factors(rope: Mapping[str, Any], size: int) -> list[float]:
    """Return what Llama 3 divides its frequencies by: of transformers' own, not of ours."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made: Any = LlamaConfig
    config = made(hidden_size=4 * size, num_attention_heads=4, rope_parameters=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    usual = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return [float(each) for each in usual / scaled]


def keys_of(model: Any, architecture: str) -> dict[str, Any]:
    """Return what the conversion writes into the header of a model."""
    config = model.config
    get: Callable[..., Any] = lambda *names: next(  # noqa: E731
        (getattr(config, name) for name in names if getattr(config, name, None) is not None), None
    )
    heads, wide = get("num_attention_heads") or 0, config.hidden_size
    head_dim = get("head_dim") or (wide // heads if heads else 0)
    rope = get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": get("max_position_embeddings") or 2**11,
        "embedding_length": wide,
        "feed_forward_length": get("intermediate_size", "n_inner") or 4 * wide,
        "attention.head_count": heads,
        "attention.head_count_kv": get("num_key_value_heads", "num_kv_heads") or heads,
        "expert_count": get("num_local_experts", "num_experts"),
        "expert_used_count": get("num_experts_per_tok"),
        "expert_feed_forward_length": get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": get("shared_expert_intermediate_size"),
        "attention.sliding_window": get("sliding_window"),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }
    rms = get("rms_norm_eps") or (config.norm_eps if architecture == "lfm2" else None)
    keys["attention.layer_norm_rms_epsilon"] = rms
    if rms is None:
        plain_norm = get("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
        keys["attention.layer_norm_epsilon"] = plain_norm
    if rope:
        keys["rope.freq_base"] = float(rope["rope_theta"])
        keys["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = rope["rope_type"], rope["factor"]
    keys["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "llama3":
        keys["rope.scaling.original_context_length"] = None
    if get("head_dim"):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    match architecture:
        case "phi3":
            original = config.original_max_position_embeddings
            keys["rope.scaling.original_context_length"] = original
            keys["attention.sliding_window"] = config.sliding_window or 0
            if rope["rope_type"] == "longrope":
                ratio = config.max_position_embeddings / original
                scale = math.sqrt(1 + math.log(ratio) / math.log(original))
                keys["rope.scaling.attn_factor"] = scale
        case "stablelm":
            keys["use_parallel_residual"] = config.use_parallel_residual
        case "falcon":
            keys["attention.head_count_kv"] = (
                config.num_kv_heads if config.new_decoder_architecture else 1
            )
            keys["tensor_data_layout"] = "jploski"
        case "gpt2":
            del keys["attention.head_count_kv"]
        case "gpt-oss":
            keys["expert_feed_forward_length"] = config.intermediate_size
        case "lfm2":
            kinds = config.layer_types
            each = config.num_key_value_heads
            keys["attention.head_count_kv"] = [0 if kind == "conv" else each for kind in kinds]
            keys["shortconv.l_cache"] = config.conv_L_cache
        case "mamba":
            keys |= {"feed_forward_length": 0, "context_length": 2**20}
            keys["attention.layer_norm_rms_epsilon"] = keys.pop("attention.layer_norm_epsilon")
            keys |= {
                "ssm.conv_kernel": config.conv_kernel,
                "ssm.inner_size": config.intermediate_size,
                "ssm.state_size": config.state_size,
                "ssm.time_step_rank": config.time_step_rank,
                "ssm.dt_b_c_rms": False,
            }
    if "llama" in architecture or "qwen" in architecture:
        keys["vocab_size"] = config.vocab_size
    return {f"{architecture}.{n}": value for n, value in keys.items() if value is not None}


def tokenizer_keys(rows: int) -> dict[str, Any]:
    """Return what the conversion writes of the tiny tokenizer, filled up to so many tokens."""
    tokenizer: Any = tiny_tokenizer()
    known = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens = known + [f"[PAD{place}]" for place in range(len(known), rows)]
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            3 if token in special else 1 if place < len(known) else 5
            for place, token in enumerate(tokens)
        ],
        "tokenizer.ggml.merges": [" ".join(each) for each in merges],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def write_file(
    file: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: str = "F32",
    per_part: int = 0,
) -> Path:
    """Write a GGUF file; in parts of so many tensors each, where `per_part` says so."""
    import gguf

    writer: Any = gguf.GGUFWriter(str(file), architecture, split_max_tensors=per_part)
    for name, value in keys.items():
        _add(writer, name, value)
    for name, array in tensors.items():
        wanted: Any = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        if array.dtype == np.uint8:  # blocks that are packed already
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: Any, name: str, value: Any) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_int32 if isinstance(value, int) and value < 0 else writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](name, value)


@dataclass(frozen=True)
class Sample:
    """A tiny model, and what a GGUF file of it holds."""

    model: Any
    folder: Path
    """With config.json and tokenizer, without weights."""
    architecture: str
    keys: dict[str, Any]
    tensors: Tensors

    def write(
        self,
        folder: Path,
        keys: Mapping[str, Any] | None = None,
        tensors: Tensors | None = None,
        **options: Any,
    ) -> Path:
        """Write its file; with other values of some keys (None takes one out), other tensors."""
        given = {n: v for n, v in {**self.keys, **(keys or {})}.items() if v is not None}
        tensors = self.tensors if tensors is None else tensors
        return write_file(folder / "x.gguf", self.architecture, given, tensors, **options)

    def beside(self, folder: Path) -> Path:
        """Copy config.json and tokenizer, and return where to."""
        return Path(shutil.copytree(self.folder, folder))


def sample(name: str, folder: Path) -> Sample:
    """Make the model of a case in a folder, and all that goes into its file."""
    architecture = CASES[name].architecture
    model = make_model(name, folder)
    (folder / "model.safetensors").unlink()
    rows = model.config.vocab_size
    keys = {"general.name": "tiny", **keys_of(model, architecture), **tokenizer_keys(rows)}
    return Sample(model, folder, architecture, keys, tensors_of(model, architecture))


def write_gguf(folder: Path, kind: str = "F32", change: Change = lambda tensors: None) -> Path:
    """Write the llama in `folder` as a GGUF file, as llama.cpp's conversion does."""
    model = plain(folder)
    tensors = tensors_of(model, "llama")
    change(tensors)
    rows = model.config.vocab_size
    keys = {"general.name": "tiny", **keys_of(model, "llama"), **tokenizer_keys(rows)}
    return write_file(folder / f"{kind}.gguf", "llama", keys, tensors, kind)


def contract_words(contract: Any) -> list[str]:
    """Return what a contract's recipe needs beside its options: a folder with a GGUF file."""
    folder = Path("models/gguf").absolute()
    if not (folder / "F32.gguf").exists():
        write_gguf(tiny_model("llama", folder), "F32")
    return [f"model.path={folder}", "model.dtype=float32", "decode.max_new_tokens=5"]
