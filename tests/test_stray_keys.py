"""Keys of config.json that a model's code ignores: told, and planned and run as the code does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import recipe, verdict
from engine.blueprint import sources
from engine.config_keys import SIZING, stray, text_part
from engine.errors import CheckpointError
from engine.families import family
from engine.loading.common import made_config
from engine.planning import planner
from engine.recipe import search_folders
from engine.shape import WINDOWED, ModelShape, read_shape
from tests import plain
from tests.conftest import Build
from tests.models import FAMILIES, VOCABULARY, tiny_config, tiny_model

Model = Callable[[str], Path]

ODD: dict[str, Any] = {
    "num_key_value_heads": 1, "num_kv_heads": 1, "n_head_kv": 1, "kv_n_heads": 1, "n_kv_heads": 1,
    "head_dim": 8, "d_kv": 8, "sliding_window": 4, "attention_chunk_size": 4,
    "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"],
    "layers_block_type": ["attention", "attention"], "num_kv_shared_layers": 1,
    "per_layer_config": {"0": {"num_key_value_heads": 1}}, "attention_k_eq_v": True,
    "num_global_key_value_heads": 1, "global_head_dim": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "multi_query": True,
    "new_decoder_architecture": True, "alibi": True, "attn_logit_softcapping": 1.0,
    "num_experts": 3, "num_local_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 3,
    "max_position_embeddings": 50, "n_positions": 50, "max_seq_len": 50, "seq_length": 50,
    "n_ctx": 50, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 77.0,
    "rotary_emb_base": 77.0, "partial_rotary_factor": 0.5, "rotary_pct": 0.5, "rotary_dim": 8,
    "num_layers": 1, "n_layer": 1, "n_layers": 1, "n_embd": 32, "n_embed": 32, "d_model": 32,
    "n_head": 2, "n_heads": 2, "n_vocab": 99, "padded_vocab_size": 99,
    "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 99,
}  # fmt: skip
"""Each name that sizes some model, with a value that the tiny ones do not have."""

BROKEN = {"gemma4_assistant"}
"""Types whose config cannot be made of its defaults."""

IDS = torch.tensor([[(7 * n + 11) % 90 + 3 for n in range(24)]])
PROMPT = 15


def test_every_name_is_tried() -> None:
    assert {name for names in SIZING for name in names} == ODD.keys()


@dataclass(frozen=True)
class Made:
    """What a config makes of a model: its weights, what it computes, and what it keeps."""

    weights: Mapping[str, tuple[int, ...]]
    logits: torch.Tensor
    """`[tokens, vocabulary]`, without a cache."""
    cached: torch.Tensor
    """The same behind the prompt, with one."""
    kept: list[tuple[int, int]]
    """For each layer with keys: numbers per token, and tokens."""


def make(config: Any) -> Made:
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        model = auto.from_config(config, attn_implementation="eager").eval()
        logits = model(IDS, use_cache=False).logits[0]
        first = model(IDS[:, :PROMPT], use_cache=True)
        cache = first.past_key_values
        cached = model(IDS[:, PROMPT:], past_key_values=cache, use_cache=True).logits[0]
    held = [
        layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)
    ]
    return Made(
        weights={name: tuple(each.shape) for name, each in model.named_parameters()},
        logits=logits,
        cached=cached,
        kept=[
            (
                each.keys.shape[1] * each.keys.shape[3]
                + each.values.shape[1] * each.values.shape[3],
                each.keys.shape[2],
            )
            for each in held
        ],
    )


def by_transformers(config: Mapping[str, Any], folder: Path) -> Made | None:
    """Return what transformers alone makes of a config; None where it makes nothing of it."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        return make(AutoConfig.from_pretrained(folder))
    except Exception:
        return None


def weights_and_logits(made: Made) -> tuple[Any, bytes]:
    return sorted(made.weights.items()), made.logits.numpy().tobytes()


def compare(base: Made, base_shape: ModelShape, key: str, config: Any, folder: Path) -> str:
    """Return what is wrong with how the engine takes a config with an odd value; '' for nothing."""
    alone = by_transformers(config, folder)
    try:
        shape = read_shape(config)
    except CheckpointError:
        return "" if alone is None or key == "head_dim" else "refused"
    if alone is None and key not in shape.ignored:
        return ""  # whatever: transformers does not run it, and this will tell
    made = make(made_config(folder, shape.ignored)) if shape.ignored or alone is None else alone
    if alone is not None and weights_and_logits(made) != weights_and_logits(alone):
        return "another model than transformers makes"
    if not torch.allclose(made.cached, made.logits[PROMPT:], atol=2e-3):
        return "answers differ with and without a cache"
    kept = [
        (values, min(IDS.shape[1], shape.sliding_window or 99) if kind in WINDOWED else 24)
        for values, kind in zip(shape.kv_values, shape.layer_types, strict=True)
        if values
    ]
    # A window's cache has one token less than is seen, once the next has come.
    wrong = [
        (planned, found)
        for planned, found in zip(kept, made.kept, strict=False)
        if planned[0] != found[0] or not (found[1] <= planned[1] or found[1] == IDS.shape[1])
        or (planned[1] == IDS.shape[1] and found[1] < planned[1])
    ]  # fmt: skip
    if wrong or len(kept) != len(made.kept):
        return f"planned {kept}, kept {made.kept}"
    if any(shape.kv_heads * shape.head_dim not in size for size in key_rows(made)):
        return f"{shape.kv_heads} heads of {shape.head_dim} in {key_rows(made)}"
    experts = any("expert" in name for name in made.weights)
    if "expert" in key and ("model.moe" in shape.traits) != experts:
        return "experts"
    stated = sources.config_class(shape.model_type)
    known = {*stated.__dataclass_fields__, *stated.attribute_map}
    if weights_and_logits(made) == weights_and_logits(base) and key not in known:
        differing = [
            field.name
            for field in fields(ModelShape)
            if field.compare and getattr(shape, field.name) != getattr(base_shape, field.name)
        ]
        if differing:
            return f"nothing changed but {differing}"
        read = key in MAPPED or (shape.model_type, key) in OVERWRITTEN
        if key not in shape.ignored and not read:
            return "it is not told"
    return ""


MAPPED = (
    "rope_theta", "rope_scaling", "rope_parameters", "num_experts_per_tok", "rotary_emb_base",
    "rotary_pct", "partial_rotary_factor",
)  # fmt: skip
"""What may change nothing in so small a model, or beside `rope_parameters`, and is read."""

OVERWRITTEN = (("deepseek_v3", "head_dim"), ("gpt_bigcode", "num_key_value_heads"))
"""What a config's own code sets, whatever is stated: here to the value that is tried."""


def key_rows(made: Made) -> list[tuple[int, ...]]:
    return [size for name, size in made.weights.items() if name.endswith(".k_proj.weight")]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama", "gpt_neox") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_shape_model_and_note_agree(name: str, tmp_path: Path) -> None:
    config = json.loads(tiny_config(name).to_json_string())
    base = by_transformers(config, tmp_path)
    assert base is not None
    shape = read_shape(config)
    assert not shape.misleading
    wrong = {
        key: why
        for key, value in ODD.items()
        if (why := compare(base, shape, key, {**config, key: value}, tmp_path))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt_neox", "num_key_value_heads", 1),
        ("llama", "sliding_window", 4),
        ("llama", "layer_types", ["sliding_attention", "full_attention"]),
        ("gpt2", "attention_chunk_size", 4),
        ("opt", "rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("mixtral", "kv_lora_rank", 8),
        ("bloom", "head_dim", 8),
    ],
)
def test_it_is_told_and_runs_as_if_not_there(
    build: Build, model: Model, tmp_path: Path, name: str, key: str, value: Any
) -> None:
    folder = tiny_model(name, tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    words = [f"model.path={folder}", "model.dtype=float32", "decode.max_new_tokens=12"]
    found = verdict.check(recipe.compose("base", words))
    assert found.ok
    note = next(note for note in found.notes if "does not read" in note)
    assert f"the code of {name} does not read {key} of config.json" in note
    plans = [
        planner.plan(recipe.compose("base", [f"model.path={each}", *words[1:]]))
        for each in (folder, model(name))
    ]
    assert plans[0].token.held == plans[1].token.held
    session = build(*words, family=name)
    assert note in session.notes
    answer = session.generate("def add(a, b):")
    ids = session.tokenizer("def add(a, b):")["input_ids"]
    # transformers with its cache is wrong with some of these, as its cache believes them.
    assert (
        answer.token_ids == plain.greedy(folder, ids, 12, use_cache=False)[: len(answer.token_ids)]
    )


def test_a_part_to_rotate_that_its_code_does_not_read(build: Build, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    scaled = rope | {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor is 0\.5, and llama rotates"):
        read_shape(config | {"rope_parameters": scaled})
    with pytest.raises(CheckpointError, match=r"2\.0 is more than all"):
        read_shape(config | {"rope_parameters": rope | {"partial_rotary_factor": 2.0}})
    for given in ({"rope_parameters": rope}, {"partial_rotary_factor": 0.5}):
        shape = read_shape(config | given)
        assert (shape.rotary_dim, shape.misleading) == (16, ["partial_rotary_factor"])
        assert "partial_rotary_factor" not in json.dumps(dict(shape.config))
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    yarn = ["position_encoding=yarn", "position_encoding.factor=2"]
    assert build(f"model.path={folder}", *yarn).generate("def add").token_ids


def test_a_head_size_that_only_positions_read_is_refused(tmp_path: Path) -> None:
    config = json.loads(tiny_config("gpt_neox").to_json_string())
    with pytest.raises(CheckpointError, match="head_dim is 8, and the attention of gpt_neox has"):
        read_shape(config | {"head_dim": 8})
    assert read_shape(config | {"head_dim": 16}).head_dim == 16


def test_what_says_nothing_else_is_not_told(tmp_path: Path) -> None:
    config = json.loads(tiny_config("gpt_neox").to_json_string())
    same = {"num_key_value_heads": 4, "n_ctx": 128, "sliding_window": None, "alibi": False}
    assert read_shape(config | same).misleading == []
    assert read_shape(config | {"n_ctx": 129}).misleading == ["n_ctx"]


def test_what_transformers_writes_is_not_told() -> None:
    """Of all causal types: attributes go by other names in files, and some are computed."""
    for name in sources.table("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES").keys() - BROKEN:
        config = json.loads(AutoConfig.for_model(name).to_json_string())
        part = text_part(config)
        inner = family(str(part.get("model_type") or f"{name}_text"))
        if stray(part, inner if inner.known else family(name)):
            assert read_shape(config).misleading == [], name


def test_known_models_have_none() -> None:
    import yaml

    for folder in search_folders():
        for file in sorted((folder / "model").glob("*.yaml")):
            config = yaml.safe_load(file.read_text()).get("config")
            if config:
                assert read_shape(config).misleading == [], file.name


def test_a_part_of_a_larger_model() -> None:
    text = json.loads(tiny_config("llama").to_json_string()) | {"sliding_window": 4}
    shape = read_shape({"model_type": "llava", "text_config": text, "vision_config": {}})
    assert shape.misleading == ["sliding_window"]
    assert "sliding_window" not in shape.config["text_config"]
    assert set(shape.layer_types) == {"full_attention"}


def test_unknown_code_may_read_all() -> None:
    config = {"model_type": "never_heard", "num_key_value_heads": 1, "sliding_window": 4}
    config |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    shape = read_shape(config | {"vocab_size": VOCABULARY})
    assert (shape.kv_heads, shape.sliding_window, dict(shape.ignored)) == (1, 4, {})
    assert not family("never_heard").known
