"""The kinds of rotary scaling: what the papers say, what transformers makes of it, who refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.contexts import PositionContext
from engine.errors import CheckpointError, RecipeError
from engine.plugins.position_encoding.dynamic import Dynamic
from engine.plugins.position_encoding.linear import Linear
from engine.plugins.position_encoding.llama3 import Llama3
from engine.plugins.position_encoding.longrope import LongRope
from engine.plugins.position_encoding.native import NativePositions
from engine.plugins.position_encoding.yarn import Yarn
from engine.positions import rotary
from engine.shape import ModelShape, read_shape
from tests.conftest import Build
from tests.models import CONTEXT, VOCABULARY, tiny_config
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

LONG = torch.randint(3, VOCABULARY, (1, 2 * CONTEXT), generator=torch.Generator().manual_seed(0))
"""A text of twice the trained context."""

FACTORS = {"llama": 8, "mistral": 8, "qwen3": 8, "gemma3": 8, "phi3": 8, "gpt_neox": 2}
"""Rotary frequencies of the families."""

BY_HAND: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": CONTEXT},
}


def overrides(kind: str, family: str) -> list[str]:
    words = [f"position_encoding={kind}", "attention=eager"]
    if kind == "longrope":
        words.append(f"position_encoding.long_factor={longer(family)}")
    return [*words, "cache=none"] if kind == "dynamic" else words


def longer(family: str) -> list[float]:
    return [1.0 + index for index in range(FACTORS[family])]


def edited_by_hand(folder: Path, kind: str, family: str) -> Any:
    """Return the checkpoint's config as the documentation of transformers says to edit it."""
    config = AutoConfig.from_pretrained(folder)
    new = {"rope_type": kind, **BY_HAND[kind]}
    if kind == "longrope":
        new |= {"long_factor": longer(family), "short_factor": longer(family)}
        if family == "phi3":
            config.original_max_position_embeddings = CONTEXT
    if kind != "dynamic":
        config.max_position_embeddings = int(CONTEXT * new["factor"])
    old = config.rope_parameters
    if family == "gemma3":
        config.rope_parameters = {**old, "full_attention": {**old["full_attention"], **new}}
    else:
        config.rope_parameters = {**old, **new}
    return config


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *((kind, "llama") for kind in BY_HAND),
        ("linear", "mistral"),
        ("dynamic", "qwen3"),
        ("llama3", "qwen3"),
        ("linear", "gemma3"),
        ("dynamic", "gemma3"),
        ("longrope", "phi3"),
        ("llama3", "gpt_neox"),
        ("longrope", "gpt_neox"),
    ],
)
def test_logits_beyond_the_context_are_those_of_a_config_edited_by_hand(
    build: Build, kind: str, family: str
) -> None:
    session = build(*overrides(kind, family), family=family)
    folder = Path(session.recipe.model.path)
    reference = logits(plain(folder, config=edited_by_hand(folder, kind, family)), LONG)
    found = logits(session.model, LONG)
    assert relative(found, reference) < 1e-6
    assert relative(found, logits(plain(folder), LONG)) > 1e-3
    evidence = receipt(session, "position_encoding").evidence
    assert evidence["context before"] == CONTEXT
    assert evidence["context after"] == session.context_tokens
    assert session.context_tokens == CONTEXT * (8 if kind == "llama3" else 4)
    assert 0 < int(evidence["of them changed"]) <= int(evidence["inverse frequencies"])


def by_the_papers(kind: str, base: float, dim: int, tokens: int) -> list[float]:
    """Return the frequencies of a text: each formula as its paper, or its code, has it."""
    usual = [base ** (-2 * index / dim) for index in range(dim // 2)]
    if kind == "linear":
        return [one / 4 for one in usual]
    if kind == "dynamic":
        stretched = base * (4 * max(tokens / CONTEXT, 1) - 3) ** (dim / (dim - 2))
        return [stretched ** (-2 * index / dim) for index in range(dim // 2)]
    if kind == "longrope":
        return [one / factor for one, factor in zip(usual, longer("llama"), strict=True)]
    turns = [CONTEXT * one / (2 * math.pi) for one in usual]
    kept = [min(max((turn - 1.0) / (4.0 - 1.0), 0.0), 1.0) for turn in turns]
    return [one / 8 * (1 - part) + one * part for one, part in zip(usual, kept, strict=True)]


@pytest.mark.parametrize("kind", BY_HAND)
def test_frequencies_are_those_of_the_papers(build: Build, kind: str) -> None:
    model: Any = build(*overrides(kind, "llama")).model
    for tokens in (CONTEXT // 2, 2 * CONTEXT, CONTEXT // 2, CONTEXT + 8):
        logits(model, LONG[:, :tokens])
        wanted = torch.tensor(by_the_papers(kind, 10000.0, 16, tokens))
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, wanted, rtol=1e-5, atol=0)


def test_dynamic_by_the_letter_of_the_paper(build: Build) -> None:
    session = build(*overrides("dynamic", "llama"), "position_encoding.alpha=1")
    model: Any = session.model
    logits(model, LONG)
    base = 10000.0 * 2 ** (16 / 14)  # s = n / L, in b * s ** (d / (d - 2))
    wanted = torch.tensor([base ** (-2 * index / 16) for index in range(8)])
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, wanted, rtol=1e-5, atol=0)


def test_scaling_of_longrope_is_that_of_its_code(build: Build) -> None:
    found = receipt(build(*overrides("longrope", "llama")), "position_encoding").evidence
    assert found["attention scaling"] == pytest.approx(
        math.sqrt(1 + math.log(4) / math.log(CONTEXT))
    )


def test_what_was_asked_before_changes_no_answer_of_dynamic(build: Build) -> None:
    session = build(*overrides("dynamic", "llama"))
    text = LONG[:, : CONTEXT + 8]
    before = logits(session.model, text)
    logits(session.model, LONG)
    assert torch.equal(logits(session.model, text), before)


def test_tokens_beyond_the_context_are_those_of_plain_transformers(build: Build) -> None:
    for kind, use_cache in (("linear", True), ("dynamic", False)):
        session = build(*overrides(kind, "llama"), "decode.max_new_tokens=8")
        folder = Path(session.recipe.model.path)
        output = session.generate("a" * (CONTEXT + 10))
        given = torch.tensor([session.tokenizer("a" * (CONTEXT + 10))["input_ids"]])
        reference: Any = plain(folder, config=edited_by_hand(folder, kind, "llama"))
        wanted = reference.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
        )
        assert output.token_ids == wanted[0, given.shape[1] :].tolist()


def test_a_head_size_that_the_config_leaves_out_is_filled_in() -> None:
    config = tiny_config("mixtral", head_dim=None)
    assert config.head_dim is None
    found = Dynamic().position_encoding(PositionContext(config=config)).config
    assert found.head_dim == 16


@pytest.mark.parametrize("kind", ["linear", "llama3", "longrope"])
def test_configs_survive_being_saved(build: Build, tmp_path: Path, kind: str) -> None:
    session = build(*overrides(kind, "gpt_neox"), family="gpt_neox")
    session.model.save_pretrained(tmp_path)
    assert relative(logits(plain(tmp_path), LONG), logits(session.model, LONG)) < 1e-6
    assert shape_of(tmp_path).max_positions == session.context_tokens


def test_values_that_stretch_nothing_are_refused(model: Callable[[str], Path]) -> None:
    llama = shape_of(model("llama"))
    for plugin, hint in (
        (Linear(factor=1.0), "factor=4"),
        (Linear(factor=math.inf), "factor=4"),
        (Dynamic(factor=0.5), "factor=4"),
        (Dynamic(alpha=0.5), "alpha=null"),
        (Yarn(beta_fast=1e308), "beta_fast=32"),
        (Llama3(factor=math.nan), "factor=8"),
        (Llama3(low_freq_factor=0), "low_freq_factor=1"),
        (Llama3(high_freq_factor=1), "high_freq_factor=4"),
        (Llama3(original_max_position_embeddings=-1), "original_max_position_embeddings=null"),
        (LongRope(), "long_factor=[…], one number per frequency"),
        (LongRope([2.0]), "long_factor=[…], one number per frequency"),
        (LongRope([1.0] * 8), "long_factor=[…]"),
        (LongRope([2.0] * 8, [2.0]), "short_factor=[…], one number per frequency"),
        (LongRope([2.0] * 8, attention_factor=-1), "attention_factor=null"),
    ):
        assert f"position_encoding.{hint}" in hints(plugin, llama), plugin
    assert not hints(LongRope([2.0] * 8), llama)
    assert len(refusals(Dynamic(factor=0.5), llama, {"cache.none"})) == 1
    far = Llama3(original_max_position_embeddings=10**6)
    assert "changes nothing" in refusals(far, llama)[0].message
    assert not LongRope([2.0]).needs
    assert "cache.none" in LongRope([2.0], [1.0]).needs


def test_kinds_that_transformers_does_not_know_are_refused(model: Callable[[str], Path]) -> None:
    llama = shape_of(model("llama"))
    assert hints(NativePositions(), llama) == hints(NativePositions()) == []
    (told,) = refusals(NativePositions(), replace(llama, rope_parameters={"type": "banana"}))
    assert "rope_type=banana" in told.message
    assert "longrope" in told.hint
    nested = {"full_attention": None, "sliding_attention": {"rope_type": "banana"}}
    assert len(refusals(NativePositions(), replace(llama, rope_parameters=nested))) == 1
    assert {"linear", "dynamic", "yarn", "longrope", "llama3"} <= rotary.kinds()


def families_with_rotary_positions() -> list[tuple[Any, ModelShape]]:
    """Return default config and shape of every causal language model that has them."""
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(model_type)
            shape = read_shape(json.loads(json.dumps(config.to_dict(), default=str)))
        except Exception:  # what has no default, or none that is whole, is nobody's checkpoint
            continue
        if shape.position == "rope":
            found.append((config, shape))
    return found


def test_models_without_a_layer_that_sees_far_are_refused(model: Callable[[str], Path]) -> None:
    gemma = shape_of(model("gemma3"))
    assert not refusals(Linear(), gemma)
    windowed = replace(gemma, layer_types=("sliding_attention",) * 2)
    assert "all layers of gemma3_text have a window" in refusals(Linear(), windowed)[0].message


def test_check_refuses_what_the_build_would() -> None:
    families = families_with_rotary_positions()
    assert len(families) > 100
    built = 0
    for config, shape in families:
        factors = [2.0] * max(1, shape.rotary_dim // 2)
        for plugin in (Yarn(), Linear(), Llama3(), Dynamic(), LongRope(factors)):
            refused = refusals(plugin, shape, {"cache.none"})
            if any("changes nothing" in problem.message for problem in refused):
                continue  # transformers would not mind; the receipt would
            given = PositionContext(config=config, traits=frozenset({"cache.none"}))
            if refused:
                with pytest.raises(RecipeError):
                    plugin.position_encoding(given)
            else:
                text = plugin.position_encoding(given).config.get_text_config()
                _make_frequencies(text)
                built += 1
    assert built > 400


def _make_frequencies(text: Any) -> None:
    """Do what a model does when it is made, with what transformers has for the kind."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for label, parameters in rotary.far_sighted(text.rope_parameters).items():
        initialize = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, _ = initialize(text, "cpu", layer_type=label or None)
        assert bool((frequencies > 0).all())


@pytest.mark.parametrize("model_type", ["phimoe", "beam", "cohere_compass_text"])
def test_families_that_no_kind_fits_are_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    bare = read_shape({**config.to_dict(), "rope_parameters": None})
    for plugin in (Yarn(), Linear(), Dynamic()):
        assert hints(plugin, bare) == ["position_encoding=native"]
        with pytest.raises(RecipeError, match="position_encoding="):
            plugin.position_encoding(PositionContext(config=config))


def test_an_unknown_kind_fails_late_without_check() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {**config.rope_parameters, "rope_type": "banana"}
    auto: Any = AutoModelForCausalLM
    with pytest.raises(KeyError, match="banana"):
        auto.from_config(config)


def test_impossible_parts_of_a_head_are_a_fault_of_the_config() -> None:
    config = tiny_config("llama").to_dict()
    config["rope_parameters"] = {"rope_theta": 1e4, "partial_rotary_factor": -1}
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        read_shape(config)


def test_unchanged_frequencies_are_no_proof(build: Build) -> None:
    session, native = build("position_encoding=linear"), build()
    assert verdict(Linear(), session)
    for plugin in (Linear(), Llama3(), LongRope([2.0] * 8)):
        assert not verdict(plugin, session, source_config=session.config)
        assert not verdict(plugin, native)
    assert not verdict(Dynamic(), native, context_tokens=native.context_tokens)
