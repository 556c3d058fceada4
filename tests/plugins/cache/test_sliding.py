"""cache=sliding gives what a mask over all tokens would give, and keeps no more than its window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.caching.measuring import measure
from engine.contexts import CacheContext
from engine.plugins.cache.sliding import Sliding
from tests.conftest import Build
from tests.plugins.cache.evicted import batch, in_pieces, positions, reference
from tests.plugins.helpers import held, hints, plain, probe, receipt, refusals, shape_of, verdict

WINDOW = 17
PIECES = (40, 1, 1, 9, 1, 8)
"""A prompt longer than the window, steps, another turn, steps, another turn."""


@pytest.mark.parametrize("implementation", ["native", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "falcon-rotary"])
def test_it_is_a_mask_over_all_tokens(build: Build, family: str, implementation: str) -> None:
    words = ("cache=sliding", f"cache.window={WINDOW}", f"attention={implementation}")
    session = build(*words, family=family)
    ids, mask = batch((60, 45, 22), 60)
    expected = reference(plain(Path(session.recipe.model.path)), ids, mask, WINDOW)
    found = in_pieces(session.model, session.new_cache(3, 60).cache, ids, mask, PIECES)
    real = mask.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "lfm2", "qwen3_next", "gpt_bigcode", "gpt_oss"])
def test_layers_of_other_kinds_stay_as_they_are(build: Build, family: str) -> None:
    session = build("cache=sliding", f"cache.window={WINDOW}", family=family)
    ids, mask = batch((60, 45), 60)
    expected = reference(plain(Path(session.recipe.model.path)), ids, mask, WINDOW)
    found = in_pieces(session.model, session.new_cache(2, 60).cache, ids, mask, PIECES)
    real = mask.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-3)


def test_it_forgets_what_changes_the_answer(build: Build) -> None:
    session = build("cache=sliding", f"cache.window={WINDOW}")
    ids, mask = batch((60,), 60)
    whole = session.model(input_ids=ids, use_cache=False).logits
    found = in_pieces(session.model, session.new_cache(1, 60).cache, ids, mask, PIECES)
    assert torch.allclose(found[:, :WINDOW], whole[:, :WINDOW], atol=1e-4)
    assert not torch.allclose(found[:, -1], whole[:, -1], atol=1e-1)


def test_a_prompt_and_a_turn_answer_as_masked_transformers_does(build: Build) -> None:
    session = build("cache=sliding", f"cache.window={WINDOW}", "decode.max_new_tokens=6")
    text = "def add(a, b): return a + b  # the sum of two numbers"
    ids = session.tokenizer(text, return_tensors="pt")["input_ids"]
    model = plain(Path(session.recipe.model.path))
    assert ids.shape[1] > WINDOW
    for _ in range(6):
        logits = reference(model, ids, torch.ones_like(ids), WINDOW)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], -1)
    assert session.generate(text).token_ids == ids[0, -6:].tolist()
    both = session.generate([text, "def"])
    assert both[0].token_ids == ids[0, -6:].tolist()
    assert both[1].token_ids == session.generate("def").token_ids


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_bigcode", "deepseek_v3", "lfm2"])
def test_it_is_as_large_as_estimated(model: Callable[[str], Path], family: str) -> None:
    reference_model = plain(model(family))
    for tokens in (5, 40):
        context = CacheContext(config=reference_model.config, batch=2, max_tokens=tokens)
        cache = Sliding(window=WINDOW).cache(context).cache
        ids, mask = batch((tokens, tokens), tokens)
        in_pieces(reference_model, cache, ids, mask, (tokens,))
        planned = held(Sliding(window=WINDOW), shape_of(model(family)), tokens, batch=2)
        assert measure(cache)["bytes"] == planned
        assert measure(cache)["tokens held"] == min(tokens, WINDOW - 1)


def test_only_what_was_not_forgotten_can_be_cut_off(build: Build) -> None:
    session = build("cache=sliding", f"cache.window={WINDOW}")
    cache = session.new_cache(1, 60).cache
    ids, mask = batch((60,), 60)
    in_pieces(session.model, cache, ids, mask, (10,))
    assert cache is not None
    assert cache.is_croppable
    cache.crop(-4)
    assert cache.get_seq_length() == measure(cache)["tokens held"] == 6
    found = in_pieces(session.model, cache, ids, mask, (30,))
    assert not cache.is_croppable
    assert found.shape[1] == 30
    with pytest.raises(RuntimeError, match="gone"):
        cache.crop(-1)


def test_rows_can_be_picked_and_repeated(build: Build) -> None:
    session = build("cache=sliding", f"cache.window={WINDOW}")
    cache: Any = session.new_cache(2, 60).cache
    ids, mask = batch((41, 33), 41)
    in_pieces(session.model, cache, ids[:, :40], mask[:, :40], (40,))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    order = [1, 0]
    expected = reference(plain(Path(session.recipe.model.path)), ids, mask, WINDOW)[order, -1]
    with torch.no_grad():
        found = session.model(
            input_ids=ids[order, -1:],
            attention_mask=mask[order],
            position_ids=positions(mask)[order, -1:],
            past_key_values=cache,
        ).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_cannot_be_is_refused(model: Callable[[str], Path]) -> None:
    shape = shape_of(model("llama"))
    assert hints(Sliding(window=1), shape) == ["cache.window=1024"]
    assert hints(Sliding(window=2), shape) == []
    assert hints(Sliding(window=10**20), shape) == ["cache=dynamic, which forgets nothing"]
    assert hints(Sliding(window=15), shape_of(model("gemma3"))) == ["cache.window=1024"]
    assert hints(Sliding(window=16), shape_of(model("gemma3"))) == []
    (problem,) = refusals(Sliding(), shape_of(model("mistral")))
    assert problem.code == "does-nothing"
    mixed = replace(shape, layer_types=("full_attention", "hybrid"))
    (problem,) = refusals(Sliding(), mixed)
    assert problem.code == "cache-unsupported"
    assert "hybrid" in problem.message
    assert hints(Sliding()) == []


def test_the_proof_takes_no_memory(build: Build) -> None:
    window = 2**31
    session = build("cache=sliding", f"cache.window={window}")
    assert receipt(session, "cache").evidence["of a longer text, tokens held"] == window - 1


def test_another_cache_is_no_proof(build: Build) -> None:
    session = build("cache=sliding", f"cache.window={WINDOW}")
    evidence = receipt(session, "cache").evidence
    assert evidence["layers that forget"] == 2
    assert evidence["of a longer text, tokens held"] == WINDOW - 1
    assert verdict(Sliding(window=WINDOW), session)
    assert not verdict(Sliding(window=WINDOW + 1), session)
    assert not verdict(Sliding(window=WINDOW), session, probe=probe(cache=None))
    assert not verdict(Sliding(window=WINDOW), session, probe=build("cache=dynamic").probe)
    fresh = Sliding(window=WINDOW).cache(CacheContext(config=session.config, batch=1, max_tokens=9))
    assert not verdict(Sliding(window=WINDOW), session, probe=probe(cache=fresh.cache))
