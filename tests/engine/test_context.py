"""The context of config.json, by any of the ways of model cards: in check, plan and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import RuntimeFailure
from engine.planning.planner import plan
from engine.shape import read_shape
from tests import plain
from tests.conftest import Build
from tests.models import CONTEXT, tiny_model

FLAT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 320,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTORS = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8}

STATED: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 2048),
    "plain": ({"max_position_embeddings": 4096}, 4096),
    "linear": (
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
        16384,
    ),
    "dynamic": (
        {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        8192,
    ),
    "yarn as on the card of Qwen2.5": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        },
        131072,
    ),
    "yarn without the original": (
        {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "yarn", "factor": 2.5}},
        10240,
    ),
    "yarn, and the context is stated": (
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
            },
        },
        163840,
    ),
    "rope_parameters of version 5": (
        {
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
        16384,
    ),
    "Llama 3.1": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
        },
        131072,
    ),
    "Llama 3.2, whose factor reaches further than it was trained": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LLAMA3},
        },
        131072,
    ),
    "llama3, the context left as it was": (
        {
            "max_position_embeddings": 8192,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
        },
        65536,
    ),
    "Phi-3 of 128k": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
        131072,
    ),
    "longrope with a factor": (
        {
            "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "longrope", "factor": 8.0, **FACTORS},
        },
        32768,
    ),
    "Command R": (
        {"model_type": "cohere", "max_position_embeddings": 8192, "model_max_length": 131072},
        131072,
    ),
    "LongChat": (
        {
            "max_position_embeddings": 2048,
            "max_sequence_length": 16384,
            "rope_scaling": {"type": "linear", "factor": 8.0},
        },
        16384,
    ),
    "no limit, as tokenizers say": (
        {"max_position_embeddings": 4096, "model_max_length": 10**30},
        4096,
    ),
    "Gemma 3, whose context is that of the class": (
        {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        131072,
    ),
    "Gemma 3 as version 5 saves it": (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        131072,
    ),
    "a factor that is left open": (
        {
            "max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "yarn",
                "factor": None,
                "original_max_position_embeddings": 1024,
            },
        },
        4096,
    ),
    "a factor of one": (
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 1.0}},
        4096,
    ),
    "a table of positions, which does not stretch": (
        {
            "model_type": "gpt2",
            "n_positions": 128,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        128,
    ),
    "code that is not known": (
        {
            "model_type": "never_heard",
            "max_position_embeddings": 128,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        512,
    ),
}


@pytest.mark.parametrize("way", STATED)
def test_it_is_as_long_as_the_config_says(way: str) -> None:
    config, context = STATED[way]
    assert read_shape({"model_type": "llama", **FLAT, **config}).max_positions == context


SCALED = {
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
WORDS = "long ago, before any of this was written down, " * 8


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models whose config.json stretches their positions, as model cards say."""
    made = {}
    for kind, scaling in SCALED.items():
        folder = tiny_model("llama", tmp_path_factory.mktemp(kind))
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        config |= {"rope_theta": 10000.0, "rope_scaling": scaling}
        (folder / "config.json").write_text(json.dumps(config))
        made[kind] = folder
    return made


@pytest.mark.parametrize("kind", SCALED)
def test_check_plan_and_run_agree(build: Build, scaled: dict[str, Path], kind: str) -> None:
    words = (f"model.path={scaled[kind]}", "decode.max_new_tokens=8")
    recipe = engine.compose("base", [*words, "model.dtype=float32"])
    verdict, planned = engine.check(recipe), plan(recipe)
    assert verdict.shape is not None
    assert verdict.shape.max_positions == planned.longest_context == 4 * CONTEXT
    (note,) = [note for note in verdict.notes if "stretches" in note]
    assert note == f"config.json states 128 positions, and stretches them to 512 (rope_type {kind})"
    session = build(*words)
    ids = list(session.tokenizer(WORDS)["input_ids"])
    assert CONTEXT < len(ids) < 4 * CONTEXT
    assert session.context_tokens == 4 * CONTEXT
    assert session.generate(WORDS).token_ids == plain.greedy(scaled[kind], ids, 8)


@pytest.mark.parametrize("kind", SCALED)
def test_beyond_it_no_hint_leads_to_a_refusal(
    build: Build, scaled: dict[str, Path], kind: str
) -> None:
    session = build(f"model.path={scaled[kind]}", "decode.max_new_tokens=8")
    with pytest.raises(RuntimeFailure, match="positions for 512") as refusal:
        session.generate(WORDS * 3)
    assert refusal.value.problems[0].hint == "shorten the prompt", "what is scaled stays so"


@pytest.mark.parametrize(
    ("family", "words", "hint"),
    [
        ("llama", (), "position_encoding=yarn position_encoding.factor=4"),
        (
            "llama",
            ("position_encoding=linear", "position_encoding.factor=2"),
            "position_encoding.factor=4",
        ),
        ("gpt2", (), "position_encoding=learned position_encoding.factor=4"),
    ],
)
def test_what_it_says_to_type_gives_the_room(
    build: Build, family: str, words: tuple[str, ...], hint: str
) -> None:
    session = build(*words, "decode.max_new_tokens=8", family=family)
    text = WORDS * (2 if words else 1)
    with pytest.raises(RuntimeFailure, match="shorten the prompt, or stretch") as refusal:
        session.generate(text)
    said = refusal.value.problems[0].hint.partition("positions: ")[2]
    assert said.partition("=")[0] == hint.partition("=")[0]
    kept = [word for word in words if word.partition("=")[0] != said.partition("=")[0]]
    assert build(*kept, *said.split(), "decode.max_new_tokens=8", family=family).generate(text)
