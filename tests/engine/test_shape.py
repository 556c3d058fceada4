"""The shape that is read from config.json, held against what transformers builds from it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from engine import families
from engine.errors import CheckpointError
from engine.shape import ModelShape, TensorSize, read_shape

# In each, all sizes differ from one another, so that none can stand in for another.
LLAMA = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 70,
    "max_position_embeddings": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 4,
    "n_positions": 99,
    "vocab_size": 70,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
FALCON = MHA | {"new_decoder_architecture": False}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 14,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", LLAMA, "rope"),
    "mistral": ("mistral", LLAMA | {"sliding_window": 5}, "rope"),
    "qwen2": ("qwen2", LLAMA, "rope"),
    "qwen2-window": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "rope",
    ),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}, "rope"),
    "gemma2": ("gemma2", LLAMA | {"head_dim": 16, "sliding_window": 5}, "rope"),
    "gemma3": ("gemma3_text", LLAMA | {"head_dim": 16, "sliding_window": 5}, "rope"),
    "gemma4": (
        "gemma4_text",
        LLAMA
        | {
            "num_hidden_layers": 6,
            "head_dim": 16,
            "sliding_window": 5,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 70,
        },
        "rope",
    ),
    "gpt2": ("gpt2", GPT, "learned"),
    "gpt_bigcode": ("gpt_bigcode", GPT, "learned"),
    "gpt_bigcode-mha": ("gpt_bigcode", GPT | {"multi_query": False}, "learned"),
    "bloom": ("bloom", GPT | {"hidden_size": 48}, "alibi"),
    "falcon-alibi": ("falcon", FALCON | {"alibi": True}, "alibi"),
    "falcon-rotary": ("falcon", FALCON, "rope"),
    "falcon-mha": ("falcon", FALCON | {"multi_query": False}, "rope"),
    "falcon-new": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "rope",
    ),
    "mpt": (
        "mpt",
        {"n_layers": 3, "d_model": 48, "n_heads": 4, "max_seq_len": 99, "vocab_size": 70},
        "alibi",
    ),
    "opt": ("opt", MHA | {"ffn_dim": 40, "word_embed_proj_dim": 48}, "learned"),
    "gpt_neox": ("gpt_neox", MHA, "rope"),
    "phi3": ("phi3", LLAMA | {"sliding_window": 5}, "rope"),
    "starcoder2": ("starcoder2", LLAMA | {"sliding_window": 5}, "rope"),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 2}, "rope"),
    "olmo2": ("olmo2", LLAMA, "rope"),
    "gptj": ("gptj", GPT | {"rotary_dim": 6}, "rope"),
    "deepseek_v3": ("deepseek_v3", LLAMA | LATENT, "rope"),
    "xglm": (
        "xglm",
        {
            "num_layers": 3,
            "d_model": 48,
            "attention_heads": 4,
            "ffn_dim": 40,
            "vocab_size": 70,
            "max_position_embeddings": 99,
        },
        "sinusoidal",
    ),
}


class Case(SimpleNamespace):
    config: Any
    shape: ModelShape
    model: Any
    position: str
    name: str


def build(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def as_saved(config: Any) -> dict[str, Any]:
    """Return config.json as it comes back from a disk."""
    parsed: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return parsed


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    model_type, sizes, position = FAMILIES[request.param]
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    model = build(config).eval()
    shape = read_shape(as_saved(config))
    return Case(config=config, shape=shape, model=model, position=position, name=request.param)


def cached(model: Any, tokens: int) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((1, tokens), 3), past_key_values=cache, use_cache=True)
    return cache


def test_sizes_are_those_of_the_model(case: Case) -> None:
    assert case.shape.layers == case.config.num_hidden_layers
    assert case.shape.hidden_size == case.config.hidden_size == 48
    assert case.shape.heads == case.config.num_attention_heads == 4
    assert case.shape.vocab_size == case.model.get_input_embeddings().weight.shape[0] == 70


def test_cache_bytes_are_those_of_a_real_cache(case: Case) -> None:
    cache = cached(case.model, tokens=3)
    numbers = sum(each.keys.numel() + each.values.numel() for each in cache.layers)
    assert case.shape.kv_values_kept(1) == numbers / 3


def test_key_value_heads_are_those_of_a_real_cache(case: Case) -> None:
    if case.name in ("deepseek_v3", "falcon-new"):
        pytest.skip("keeps something else than its heads; the bytes are tested above")
    keys = cached(case.model, tokens=3).layers[0].keys
    assert (case.shape.kv_heads, case.shape.head_dim) == (keys.shape[1], keys.shape[3])


def test_windowed_layers_are_those_of_a_real_cache(case: Case) -> None:
    layers = cached(case.model, tokens=3).layers
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    told = [
        case.shape.sliding_window if kind == "sliding_attention" else None
        for kind in case.shape.layer_types
    ]
    assert told == windows
    assert ("model.sliding" in case.shape.traits) == any(windows)


def test_sdpa_trait_is_what_the_class_says(case: Case) -> None:
    assert ("model.sdpa" in case.shape.traits) == case.model._supports_sdpa


def test_attention_trait_is_what_transformers_says(case: Case) -> None:
    told = "model.attention_interface" in case.shape.traits
    assert told == type(case.model)._can_set_attn_implementation()


def test_split_projections_are_those_of_the_model(case: Case) -> None:
    names = {name.rsplit(".", 1)[-1] for name, _ in case.model.named_modules()}
    assert ("model.split_kv" in case.shape.traits) == ({"k_proj", "v_proj"} <= names)


def test_key_value_heads_trait_is_what_the_config_class_says(case: Case) -> None:
    if "model.split_kv" not in case.shape.traits:
        pytest.skip("its projections cannot be pooled anyway")
    told = "model.kv_heads" in case.shape.traits
    assert told == hasattr(case.config, "num_key_value_heads")


def test_position_is_known(case: Case) -> None:
    assert case.shape.position == case.position
    assert ("model.alibi" in case.shape.traits) == (case.position == "alibi")


def test_rope_trait_means_that_rope_parameters_take_effect(case: Case) -> None:
    rotary = any(hasattr(module, "inv_freq") for module in case.model.modules())
    rotary = rotary or any("inv_freq" in name for name, _ in case.model.named_buffers())
    standard = rotary and case.position == "rope"
    assert ("model.rope" in case.shape.traits) == standard


def test_tensors_decide_on_projections() -> None:
    def shape_with(*names: str) -> ModelShape:
        return read_shape(LLAMA | {"model_type": "llama"}, dict.fromkeys(names, TENSOR))

    layer = "model.layers.0.self_attn"
    split = shape_with(f"{layer}.k_proj.weight", f"{layer}.v_proj.weight")
    fused = shape_with(f"{layer}.qkv_proj.weight", "vision.k_proj.weight", "vision.v_proj.weight")
    assert "model.split_kv" in split.traits
    assert "model.split_kv" not in fused.traits


TENSOR = TensorSize(dtype="BF16", shape=(4, 5), nbytes=40)


def test_weight_bytes_need_tensors() -> None:
    config = LLAMA | {"model_type": "llama"}
    assert read_shape(config).weight_bytes is None
    assert read_shape(config, {"a": TENSOR, "b": TENSOR}).weight_bytes == 80


def test_position_limits() -> None:
    def limit(name: str) -> int | None:
        model_type, sizes, _ = FAMILIES[name]
        return read_shape({**sizes, "model_type": model_type}).max_positions

    assert [limit(name) for name in ("llama", "gpt2", "opt")] == [99, 99, 99]
    assert [limit(name) for name in ("bloom", "falcon-alibi")] == [None, None]
    assert limit("mpt") == 99


def test_mpt_really_ends_at_its_limit() -> None:
    config = AutoConfig.for_model("mpt", n_layers=1, d_model=8, n_heads=2, max_seq_len=6)
    model = build(config)
    assert cached(model, tokens=6).get_seq_length() == 6
    with pytest.raises(RuntimeError, match="size"):
        cached(model, tokens=7)


def test_absent_keys_have_the_defaults_of_the_config_class() -> None:
    for model_type in ("llama", "gpt2", "bloom", "gpt_bigcode", "mistral", "gemma2", "deepseek_v3"):
        bare = read_shape({"model_type": model_type})
        assert bare == read_shape(as_saved(AutoConfig.for_model(model_type))), model_type


def test_layer_types_that_a_file_leaves_out() -> None:
    for model_type in ("gemma2", "gemma3_text", "cohere2", "qwen2", "qwen3_next", "gpt_oss"):
        saved = as_saved(AutoConfig.for_model(model_type))
        complete = read_shape(saved)
        del saved["layer_types"]
        assert read_shape(saved).layer_types == complete.layer_types, model_type


def test_the_rhythm_of_layers_is_the_config_classes() -> None:
    saved = as_saved(AutoConfig.for_model("llama4_text"))
    stated = saved.pop("layer_types")
    assert read_shape(saved).layer_types == tuple(stated)


def test_null_in_the_file_is_an_answer() -> None:
    """Mistral's class has a window of 4096; its later checkpoints say null."""
    sizes = LLAMA | {"model_type": "mistral"}
    assert read_shape(sizes).sliding_window == 4096
    without = read_shape(sizes | {"sliding_window": None})
    assert without.sliding_window is None
    assert set(without.layer_types) == {"full_attention"}


def test_several_parts_are_read_from_the_text_part() -> None:
    config = AutoConfig.for_model("gemma3")
    shape = read_shape(as_saved(config))
    assert shape.model_type == "gemma3"
    assert (shape.layers, shape.heads) == (26, 8)
    old_llava = {
        "model_type": "llava",
        "vision_config": {"hidden_size": 7},
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "torch_dtype": "float16",
    }
    shape = read_shape(old_llava)
    assert (shape.layers, shape.hidden_size, shape.vocab_size) == (32, 4096, 32064)
    assert shape.dtype == "float16"
    assert "model.attention_interface" in shape.traits


def test_shared_layers_keep_nothing() -> None:
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=10, num_kv_shared_layers=4)
    shape = read_shape(as_saved(config))
    assert shape.layer_types[6:] == ("dummy",) * 4
    assert shape.kv_values[5] > 0
    assert shape.kv_values[6:] == (0,) * 4


def test_model_without_attention_keeps_nothing() -> None:
    shape = read_shape(as_saved(AutoConfig.for_model("mamba")))
    assert shape.heads == 0
    assert shape.kv_values_kept(9) == 0


def test_a_window_keeps_no_more_than_itself() -> None:
    windowed = LLAMA | {"model_type": "mistral", "sliding_window": 4}
    one = read_shape(LLAMA | {"model_type": "llama"}).kv_values_kept(1)
    assert [read_shape(windowed).kv_values_kept(n) for n in (1, 4, 9)] == [one, 4 * one, 4 * one]


def test_checkpoint_facts() -> None:
    shape = read_shape(
        LLAMA
        | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "dtype": "torch.bfloat16",
            "quantization_config": {"quant_method": "gptq"},
            "auto_map": {"AutoConfig": "x.Y"},
        }
    )
    assert (shape.architecture, shape.dtype) == ("LlamaForCausalLM", "bfloat16")
    assert shape.quantization == "gptq"
    assert not shape.remote_code


def test_unknown_type_with_code_of_its_own() -> None:
    config = LLAMA | {"model_type": "never_heard", "auto_map": {"AutoConfig": "x.Y"}}
    shape = read_shape(config)
    assert shape.remote_code
    assert (shape.layers, shape.head_dim) == (3, 12)
    assert not shape.traits
    assert not read_shape(LLAMA | {"model_type": "../llama"}).remote_code


def test_unknown_type_tells_its_positions_by_its_keys() -> None:
    config = LLAMA | {"model_type": "never_heard"}
    assert read_shape(config).position == "none"
    assert read_shape(config | {"rope_theta": 1e4}).position == "rope"
    assert read_shape(config | {"alibi": True}).position == "alibi"
    assert read_shape(config | {"attn_config": {"alibi": True}}).position == "alibi"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": 3}, "model_type is missing"),
        ({"vocab_size": -1}, "vocab_size must be a whole number above 0, not -1"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a whole number above 0, not '3'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and no model has more"),
        ({"rope_theta": -5}, "rope_theta must be a number above 0, not -5"),
        ({"rope_parameters": {"rope_theta": "a"}}, "rope_theta must be a number above 0, not 'a'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide by 2 key/value heads"),
        (
            {"model_type": "llama", "num_attention_heads": 5, "num_key_value_heads": 5},
            "hidden_size 48 does not divide by 5 attention heads",
        ),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide by 3 key/value heads"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers 3"),
        ({"layer_types": "full"}, "layer_types must be a list of names"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"quantization_config": "gptq"}, "quantization_config must be a mapping"),
        ({"architectures": 3}, "architectures must be a list"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as refusal:
        read_shape({**LLAMA, "model_type": "qwen3", **change})
    assert words in str(refusal.value)


@pytest.mark.parametrize("junk", [None, "x", -1, 0, 1.5, True, [], [1], {}, {"a": 1}], ids=repr)
@pytest.mark.parametrize("name", ["qwen2-window", "gemma4", "deepseek_v3", "falcon-new", "mpt"])
def test_junk_is_refused_or_ignored_but_never_crashes(name: str, junk: Any) -> None:
    model_type, sizes, _ = FAMILIES[name]
    saved = as_saved(AutoConfig.for_model(model_type, **sizes))
    for key in (*saved, "architectures", "quantization_config", "text_config", "auto_map"):
        with contextlib.suppress(CheckpointError):
            read_shape({**saved, key: junk})


def test_all_missing_keys_are_named_together() -> None:
    with pytest.raises(CheckpointError) as refusal:
        read_shape({"model_type": "never_heard"})
    told = [problem.message for problem in refusal.value.problems]
    assert told == [
        f"{key} is missing"
        for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    ]


def test_without_transformers_the_file_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    families.family.cache_clear()
    try:
        shape = read_shape(LLAMA | {"model_type": "llama", "rope_theta": 1e4})
    finally:
        families.family.cache_clear()
    assert (shape.layers, shape.position, shape.traits) == (3, "rope", frozenset())


def test_reading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from engine.shape import read_shape; read_shape({'model_type': 'llama'});"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
