"""position_encoding=yarn gives the paper's frequencies, and what transformers makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from engine.contexts import PositionContext
from engine.errors import RecipeError
from engine.plugins.position_encoding.yarn import Yarn
from tests.conftest import Build
from tests.models import tiny_config
from tests.plugins.helpers import (
    hints,
    logits,
    plain,
    receipt,
    refusals,
    relative,
    shape_of,
    verdict,
)


def by_the_paper(dim: int, base: float, length: int, factor: float) -> torch.Tensor:
    """Return arXiv 2309.00071, equations 17 to 23: frequencies, blended by turns in `length`."""
    found = []
    low = math.floor(dim * math.log(length / (32 * 2 * math.pi)) / (2 * math.log(base)))
    high = math.ceil(dim * math.log(length / (1 * 2 * math.pi)) / (2 * math.log(base)))
    low, high = max(low, 0), min(high, dim - 1)
    for index in range(dim // 2):
        frequency = base ** (-2 * index / dim)
        stretched = min(max((index - low) / (high - low), 0), 1)
        found.append(frequency * (1 - stretched) + frequency / factor * stretched)
    return torch.tensor(found)


@pytest.mark.parametrize("factor", [2.0, 4.0, 8.0])
def test_frequencies_are_those_of_the_paper(build: Build, factor: float) -> None:
    session = build("position_encoding=yarn", f"position_encoding.factor={factor}")
    rotary = session.model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, by_the_paper(16, 10000.0, 128, factor))
    evidence = receipt(session, "position_encoding").evidence
    assert evidence["attention scaling"] == pytest.approx(0.1 * math.log(factor) + 1)
    assert (evidence["context before"], evidence["context after"]) == (128, 128 * factor)
    assert session.context_tokens == 128 * factor


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt_neox", "falcon-rotary"])
def test_logits_are_those_of_transformers_own_config(build: Build, family: str) -> None:
    session = build("position_encoding=yarn", "attention=eager", family=family)
    folder = Path(session.recipe.model.path)
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    reference = logits(plain(folder, config=config))
    assert relative(logits(session.model), reference) < 1e-6
    assert relative(logits(session.model), logits(plain(folder))) > 1e-3


def test_only_full_attention_is_stretched() -> None:
    config = Yarn().position_encoding(PositionContext(config=tiny_config("gemma3"))).config
    kinds = {kind: values["rope_type"] for kind, values in config.rope_parameters.items()}
    assert kinds == {"full_attention": "yarn", "sliding_attention": "default"}


def test_the_given_config_is_left_alone() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    Yarn().position_encoding(PositionContext(config=config))
    assert config.to_dict() == before


def test_every_option_counts() -> None:
    options = Yarn(
        factor=3.0,
        original_max_position_embeddings=64,
        attention_factor=1.5,
        beta_fast=16.0,
        beta_slow=2.0,
    )
    config = options.position_encoding(PositionContext(config=tiny_config("llama"))).config
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 3.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    }
    assert config.max_position_embeddings == 192


def test_text_beyond_the_old_context_is_answered(build: Build) -> None:
    session = build("position_encoding=yarn", "decode.max_new_tokens=8")
    output = session.generate("x" * 200)
    assert output.figures.prompt_tokens >= 200
    assert len(output.token_ids) == 8


def test_what_cannot_be_stretched_is_refused(model: Callable[[str], Path]) -> None:
    llama = shape_of(model("llama"))
    assert hints(Yarn(), llama) == hints(Yarn()) == []
    for family in ("gpt2", "bloom", "opt"):
        assert hints(Yarn(), shape_of(model(family))) == ["position_encoding=native"]
    assert hints(Yarn(factor=1.0), llama) == ["position_encoding.factor=4"]
    assert hints(Yarn(beta_fast=1.0), llama) == ["position_encoding.beta_fast=32"]
    assert hints(Yarn(beta_slow=0.0), llama) == ["position_encoding.beta_slow=1"]
    assert hints(Yarn(attention_factor=-1.0), llama) == ["position_encoding.attention_factor=null"]
    assert len(hints(Yarn(original_max_position_embeddings=-1), llama)) == 1
    assert hints(Yarn(), replace(llama, traits=frozenset({"model.rope"}))) == []
    (told,) = refusals(Yarn(), shape_of(model("phi3")))
    assert "transformers accepts only default, longrope for phi3" in told.message
    (told,) = refusals(Yarn(), replace(llama, rope_parameters={"type": "linear"}))
    assert "already scales its positions (linear)" in told.message
    with pytest.raises(RecipeError, match="accepts only default, longrope for phi3"):
        Yarn().position_encoding(PositionContext(config=tiny_config("phi3")))


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_config_without_rotary_positions_is_refused(family: str) -> None:
    with pytest.raises(RecipeError, match="it scales rotary positions, and"):
        Yarn().position_encoding(PositionContext(config=tiny_config(family)))


def test_a_model_that_scales_already_is_refused() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    with pytest.raises(RecipeError, match="already scales"):
        Yarn().position_encoding(PositionContext(config=config))


def test_unchanged_frequencies_are_no_proof(build: Build) -> None:
    session = build("position_encoding=yarn")
    assert verdict(Yarn(), session)
    assert not verdict(Yarn(), session, source_config=session.config)
    assert not verdict(Yarn(), build())
