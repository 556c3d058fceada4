"""GGUF files of every family that is read give the model that they were made of.

And whatever a file says is used, compared or told: each key and each tensor is changed in turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from engine.errors import CheckpointError
from engine.loading import gguf_config, gguf_header, gguf_rope, gguf_tokenizer
from engine.loading.gguf_header import GgufHeader
from engine.loading.gguf_weights import Weights
from tests.gguf_files import CASES, LONG, SHORT, Sample, sample
from tests.plugins.helpers import IDS, logits

pytest.importorskip("gguf")

Made = Callable[[str], Sample]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that makes the sample of a case, once."""
    known: dict[str, Sample] = {}

    def make(name: str) -> Sample:
        if name not in known:
            known[name] = sample(name, tmp_path_factory.mktemp(name))
        return known[name]

    return make


def judged(file: Path) -> tuple[GgufHeader, Any]:
    """Hold a file against its folder, as `check` does; give its header, and what was told."""
    header = gguf_header.read(file)
    told = gguf_config.described(header, file.parent)
    gguf_config.verify(header, file.parent)
    return header, told


def configured(told: Any) -> Any:
    """Return transformers' config of what was told."""
    return CONFIG_MAPPING[told.config["model_type"]].from_dict(dict(told.config))


def loaded(header: GgufHeader, config: Any) -> Any:
    """Return the model of a file."""
    state = Weights(header, config, torch.float32).unpack(scan=True)
    auto: Any = AutoModelForCausalLM
    with no_init_weights():
        model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    lacking = model.load_state_dict(state, strict=False)
    assert not lacking.unexpected_keys
    assert set(lacking.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


UNLIMITED = ("bloom", "mamba")
"""Their headers have a context length, and their classes no limit: that is told."""


@pytest.mark.parametrize("beside", [True, False], ids=["config.json", "header"])
@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_that_it_was_made_of(
    made: Made, tmp_path: Path, name: str, beside: bool
) -> None:
    one = made(name)
    header, told = judged(one.write(one.beside(tmp_path / "model") if beside else tmp_path))
    model = loaded(header, configured(told))
    for weight, tensor in one.model.state_dict().items():
        # What the conversion adds one to, or takes the exponential of, is rounded by that.
        assert torch.allclose(model.state_dict()[weight], tensor, rtol=1e-6, atol=1e-7), weight
    long = torch.arange(3, 83)[None] if "longrope" in name else IDS
    one.model.set_attn_implementation("eager")
    expected = logits(one.model, long)
    assert float((logits(model, long) - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert bool(told.notes) == (name in UNLIMITED)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "phi3", "starcoder2", "bloom", "lfm2"])
def test_the_config_of_a_header_is_as_transformers_reads_it(
    made: Made, tmp_path: Path, name: str
) -> None:
    """Of families and values of which its reading is right, but for what it leaves out."""
    _, told = judged(made(name).write(tmp_path))
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf").to_dict()
    ours = configured(told).to_dict()
    left_out = {"dtype", "architectures", *(["sliding_window"] if name == "phi3" else [])}
    both = {key for key in ours.keys() & theirs.keys() - left_out if not key.startswith("_")}
    differing = {key: (ours[key], theirs[key]) for key in both if ours[key] != theirs[key]}
    assert differing == {}


# ---------------------------------------------------------------------------------------------
# Nothing that a file says is silent.
# ---------------------------------------------------------------------------------------------

SAID_BY_NOBODY = {"general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre"}
SOME = ["llama-yarn", "llama-3.1", "qwen2moe", "gemma2", "phi3-longrope", "lfm2"]
REST = [name for name in CASES if name not in SOME]
EVERY = [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]


def other(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, list):
        return [other(value[0]), *value[1:]]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 1.5 if isinstance(value, float) else "x"


def answered(file: Path) -> tuple[Any, Any, Any]:
    """Return what is made of a file: its notes, its config, and what its tokenizer does."""
    header, told = judged(file)
    ends = [told.config["eos_token_id"]]
    tokenizer: Any = gguf_tokenizer.load(header, file.parent, False, ends)
    return told.notes, told.config, (tokenizer("a<s>").input_ids, tokenizer.chat_template)


def told_of(file: Path, usual: tuple[Any, Any, Any]) -> str:
    """Say how a file is answered: refused (with which words), told, used; '' if in no way."""
    try:
        answer = answered(file)
    except CheckpointError as error:
        return f"refused: {error}"
    return f"told: {answer[0]}" if answer[0] != usual[0] else "used" if answer != usual else ""


@pytest.mark.parametrize("beside", [True, False], ids=["config.json", "header"])
@pytest.mark.parametrize("name", EVERY)
def test_a_key_that_changes_is_never_silent(
    made: Made, tmp_path: Path, name: str, beside: bool
) -> None:
    one = made(name)
    folder = one.beside(tmp_path / "model") if beside else tmp_path
    usual = answered(one.write(folder))
    silent = []
    for key, value in one.keys.items():
        if key in SAID_BY_NOBODY or (isinstance(value, list) and isinstance(value[0], str)):
            continue
        if not told_of(one.write(folder, {key: other(value)}), usual):
            silent.append(key)
    # What a token is, its text says; whether it is matched whole, a tokenizer.json says as well.
    assert not set(silent) - {"tokenizer.ggml.token_type"}


HAS_DEFAULT = re.compile(
    r"rope\.|softcapping|sliding_window|head_count_kv|feed_forward_length|vocab_size|tokenizer\."
)
"""What llama.cpp has a default for, too, and sizes: whether these are right, the tensors tell."""


@pytest.mark.parametrize("beside", [True, False], ids=["config.json", "header"])
@pytest.mark.parametrize("value", ["x", 3, -1, 0, 2**31, 7.5, True, [3], ["x"]], ids=repr)
def test_a_key_of_any_value_gives_no_other_error(
    made: Made, tmp_path: Path, value: Any, beside: bool
) -> None:
    one = made("gemma3")
    folder = one.beside(tmp_path / "model") if beside else tmp_path
    usual = answered(one.write(folder))
    for key in [*one.keys, "gemma3.attention.sliding_window_pattern", "split.count"]:
        told_of(one.write(folder, {key: value}), usual)


@pytest.mark.parametrize("name", EVERY)
def test_a_header_without_a_key_gives_no_other_model(made: Made, tmp_path: Path, name: str) -> None:
    one = made(name)
    usual = answered(one.write(tmp_path))
    for key in one.keys:
        answer = told_of(one.write(tmp_path, {key: None}), usual)
        assert answer != "used" or HAS_DEFAULT.search(key), key
    for tensor in one.tensors:
        fewer = {each: array for each, array in one.tensors.items() if each != tensor}
        answer = told_of(one.write(tmp_path, tensors=fewer), usual)
        assert answer.startswith("refused") or tensor in ("output.weight", *gguf_rope.TABLES)


@pytest.mark.parametrize("key", ["block_count", "attention.layer_norm_rms_epsilon"])
def test_a_header_that_leaves_something_open_says_so(made: Made, tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"the header lacks qwen2\.{key}") as refused:
        judged(made("qwen2").write(tmp_path, {f"qwen2.{key}": None}))
    assert "put the config.json" in str(refused.value)


def test_sizes_that_cannot_be_are_told_of_the_file(made: Made, tmp_path: Path) -> None:
    file = made("qwen2").write(tmp_path, {"qwen2.attention.head_count": 5})
    with pytest.raises(CheckpointError, match="does not divide by 5 attention heads") as refused:
        judged(file)
    assert str(file) in str(refused.value)


def test_a_packing_that_config_json_tells_of_is_of_other_weights(
    made: Made, tmp_path: Path
) -> None:
    one = made("gpt-oss")
    folder = one.beside(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    _, told = judged(one.write(folder))
    assert "quantization_config" not in told.config


@pytest.mark.parametrize("name", EVERY)
def test_a_tensor_that_is_missing_or_more_is_never_silent(
    made: Made, tmp_path: Path, name: str
) -> None:
    one = made(name)
    folder = one.beside(tmp_path / "model")
    usual = answered(one.write(folder))
    tables = {tensor for tensor in one.tensors if tensor.startswith("rope_")}
    for tensor in one.tensors:
        fewer = {each: array for each, array in one.tensors.items() if each != tensor}
        answer = told_of(one.write(folder, tensors=fewer), usual)
        # Factors that config.json has as well may be left out of the file.
        assert tensor in answer or tensor in tables, tensor
        more = {**one.tensors, f"{tensor}.more": one.tensors[tensor]}
        answer = told_of(one.write(folder, tensors=more), usual)
        assert "without a place in the model" in answer
    for tensor in tables:
        changed = {**one.tensors, tensor: one.tensors[tensor] * 1.5}
        answer = told_of(one.write(folder, tensors=changed), usual)
        assert tensor in answer
        assert "in the file, and config.json says" in answer


@pytest.mark.parametrize("name", ["attn_q.bias", "attn_k.bias", "attn_q_norm.weight"])
def test_biases_and_norms_that_the_config_has_no_place_for_are_refused(
    made: Made, tmp_path: Path, name: str
) -> None:
    one = made("mistral")
    folder = one.beside(tmp_path / "model")
    more = {**one.tensors, f"blk.1.{name}": np.ones(64, np.float32)}
    with pytest.raises(CheckpointError, match=rf"without a place in the model: blk\.1\.{name}"):
        judged(one.write(folder, tensors=more))


def test_keys_that_nobody_knows_are_told_and_origins_are_not(made: Made, tmp_path: Path) -> None:
    one = made("qwen2")
    more = {"qwen2.bonus": 3, "vendor.tag": "v1", "tokenizer.ggml.odd": True, "general.odd": 1}
    origin = {"general.author": "me", "general.license": "mit", "general.sampling.temp": 0.5}
    _, told = judged(one.write(tmp_path, {**more, **origin, "general.file_type": 7}))
    (note,) = told.notes
    assert all(name in note for name in more)
    assert not any(name in note for name in origin)


def test_a_key_that_the_model_cannot_obey_is_refused(made: Made, tmp_path: Path) -> None:
    one = made("qwen2")
    for key, value in {
        "logit_scale": 0.5,
        "attn_logit_softcapping": 5.0,
        "pooling_type": 3,
    }.items():
        with pytest.raises(CheckpointError, match=f"{key} is .* in the file"):
            judged(one.write(tmp_path, {f"qwen2.{key}": value}))
    judged(one.write(tmp_path, {"qwen2.logit_scale": 1.0, "qwen2.pooling_type": 0}))


@pytest.mark.parametrize(
    ("name", "key", "right", "wrong"),
    [
        ("qwen2", "attention.scale", 0.25, 0.5),
        ("gemma2", "attention.scale", 32**-0.5, 16**-0.5),
        ("qwen2", "attention.head_count", [4, 4], [4, 2]),
        ("qwen2", "feed_forward_length", [128, 128], [128, 0]),
        ("bloom", "attention.max_alibi_bias", 8.0, 4.0),
        ("falcon-40b", "tensor_data_layout", "jploski", "another"),
        ("gemma3", "attention.sliding_window_pattern", 6, 2),
        ("gemma3", "attention.sliding_window_pattern", [True] * 5 + [False, True], [True] * 7),
        ("gemma3", "rope.freq_base_swa", 10000.0, 1e6),
        ("llama-yarn", "rope.scaling.yarn_beta_fast", 32.0, 16.0),
        ("llama-yarn", "rope.scaling.yarn_ext_factor", 1.0, 0.5),
        ("llama-yarn", "rope.scaling.attn_factor", 1.0, 1.5),
        ("qwen3moe", "expert_weights_norm", True, False),
        ("qwen3moe", "expert_weights_scale", 1.0, 2.5),
        ("qwen3moe", "expert_gating_func", 1, 2),
        ("qwen2", "attention.causal", True, False),
        ("qwen2", "rope.scaling.type", "none", "linear"),
    ],
)
def test_a_key_that_is_seldom_written_is_compared(
    made: Made, tmp_path: Path, name: str, key: str, right: Any, wrong: Any
) -> None:
    one = made(name)
    folder = one.beside(tmp_path / "model")
    judged(one.write(folder, {f"{one.architecture}.{key}": right}))
    with pytest.raises(CheckpointError, match=r"in the file and .* in config\.json"):
        judged(one.write(folder, {f"{one.architecture}.{key}": wrong}))


# ---------------------------------------------------------------------------------------------
# Factors of rotary positions.
# ---------------------------------------------------------------------------------------------


def without_scaling(folder: Path) -> None:
    """Take the rotary scaling out of config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    if config["model_type"] == "phi3":
        config["rope_parameters"]["rope_theta"] = 10000.0
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["llama-3.1", "phi3-longrope"])
def test_factors_that_config_json_lacks_are_taken_from_the_file(
    made: Made, tmp_path: Path, name: str
) -> None:
    one = made(name)
    folder = one.beside(tmp_path / "model")
    without_scaling(folder)
    header, told = judged(one.write(folder))
    assert "the file's factors" in told.notes[0]
    ids = torch.arange(3, 83)[None]
    found, expected = logits(loaded(header, configured(told)), ids), logits(one.model, ids)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_factors_that_contradict_config_json_are_refused_with_both(
    made: Made, tmp_path: Path
) -> None:
    one = made("phi3-longrope")
    folder = one.beside(tmp_path / "model")
    tensors = {**one.tensors, "rope_factors_long.weight": np.array(SHORT, np.float32)}
    with pytest.raises(CheckpointError, match=r"\[1, 1\.125, .*config\.json says \[1, 1\.5, "):
        judged(one.write(folder, tensors=tensors))
    assert LONG != SHORT


def test_factors_of_no_known_scaling_ask_for_config_json(made: Made, tmp_path: Path) -> None:
    one = made("llama-3.1")
    odd = {**one.tensors, "rope_freqs.weight": one.tensors["rope_freqs.weight"] ** 2}
    with pytest.raises(CheckpointError, match=r"(?s)rope_freqs.*put the config\.json"):
        judged(one.write(tmp_path, tensors=odd))


def test_a_llama_of_factors_one_is_a_plain_one(made: Made, tmp_path: Path) -> None:
    one = made("mistral")
    ones = {**one.tensors, "rope_freqs.weight": np.ones(8, np.float32)}
    _, told = judged(one.write(tmp_path, tensors=ones))
    assert told.config["rope_parameters"]["rope_type"] == "default"


# ---------------------------------------------------------------------------------------------
# What is no model, and ties.
# ---------------------------------------------------------------------------------------------


def refusals() -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """Yield architecture, keys, and what is said of a file with these."""
    lora = {"general.type": "adapter", "adapter.type": "lora"}
    yield "llama", lora, "a LoRA adapter, which changes a model", "name the file of the model"
    yield "clip", {"general.type": "mmproj"}, "the vision or audio part of a model", "load.file"
    yield "clip", {}, "the vision or audio part of a model", "load.file"
    yield "", {"general.type": "imatrix"}, "an importance matrix", "load.file"
    yield "t5", {}, "an encoder and decoder, which continues no text", "load.file"
    yield "bert", {}, "an encoder, which continues no text", "load.file"
    yield "deepseek2", {}, "of the architecture 'deepseek2' cannot be read", "load=transformers"
    yield "minimax-m2", {}, "of the architecture 'minimax-m2' cannot be read", "load=transformers"
    yield "qwen2", {"general.quantization_version": 1}, "quantization_version 1", "take a file"


@pytest.mark.parametrize(("architecture", "keys", "why", "hint"), refusals())
def test_what_is_no_model_to_be_read_is_named(
    made: Made, tmp_path: Path, architecture: str, keys: dict[str, Any], why: str, hint: str
) -> None:
    one = replace(made("qwen2"), architecture=architecture)
    with pytest.raises(CheckpointError) as refused:
        judged(one.write(tmp_path, keys, kind="Q8_0"))
    assert why in str(refused.value)
    assert hint in str(refused.value)


def test_a_vocabulary_alone_is_no_model(made: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a vocabulary alone"):
        judged(made("qwen2").write(tmp_path, tensors={}))


def test_a_config_of_another_family_is_refused(made: Made, tmp_path: Path) -> None:
    folder = made("qwen3").beside(tmp_path / "model")
    with pytest.raises(CheckpointError, match="model_type is qwen2 in the file and qwen3 in conf"):
        judged(made("qwen2").write(folder))


@pytest.mark.parametrize("alone", [True, False])
def test_to_go_without_config_json_is_said_where_that_works(
    made: Made, tmp_path: Path, alone: bool
) -> None:
    one = made("qwen2")
    folder = one.beside(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    keys = {} if alone else {"qwen2.context_length": None}
    with pytest.raises(CheckpointError, match=r"rms_norm_eps is 0\.001 in the f") as refused:
        judged(one.write(folder, keys))
    assert ("or none: then the header tells" in str(refused.value)) == alone
    (folder / "config.json").unlink()
    if alone:
        judged(folder / "x.gguf")


def test_an_output_layer_that_is_the_embedding_rounded_otherwise_is_tied(
    made: Made, tmp_path: Path
) -> None:
    one = made("llama-tied")
    folder = one.beside(tmp_path / "model")
    embedding = one.tensors["token_embd.weight"]
    rounded = embedding * (1 + 0.05 * np.sign(embedding))
    one.write(folder, tensors={**one.tensors, "output.weight": rounded})
    header, told = judged(folder / "x.gguf")
    assert torch.allclose(logits(loaded(header, configured(told))), logits(one.model), atol=1e-6)
    one.write(folder, tensors={**one.tensors, "output.weight": embedding[::-1].copy()})
    header, told = judged(folder / "x.gguf")
    with pytest.raises(CheckpointError, match=r"output\.weight is not its embedding"):
        loaded(header, configured(told))


def test_weights_that_are_not_finite_are_named(made: Made, tmp_path: Path) -> None:
    one = made("qwen2")
    bad = {**one.tensors, "blk.1.ffn_up.weight": one.tensors["blk.1.ffn_up.weight"] * np.inf}
    header, told = judged(one.write(tmp_path, tensors=bad))
    with pytest.raises(CheckpointError, match=r"not finite: model\.layers\.1\.mlp\.up_proj"):
        loaded(header, configured(told))
    large = {**one.tensors, "output_norm.weight": np.full(64, 1e30, np.float32)}
    header, told = judged(one.write(tmp_path, tensors=large))
    with pytest.raises(CheckpointError, match="float16 is too small"):
        Weights(header, configured(told), torch.float16).unpack(scan=True)


def test_the_model_is_held_against_the_file_once_more(made: Made, tmp_path: Path) -> None:
    one = made("gpt-oss")
    header, told = judged(one.write(tmp_path))
    weights = Weights(header, configured(told), torch.float32)
    count = len(one.model.state_dict())
    assert weights.held(one.model, ()) == (count, [])
    assert weights.held(one.model, [r"\.experts\."])[0] == count - 8
    model = loaded(header, configured(told))
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks[2] += 1
    assert weights.held(model, ()) == (count, ["model.layers.1.self_attn.sinks"])
